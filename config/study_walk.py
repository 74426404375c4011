"""From gpt2 to qwen3, one component at a time, at equal parameters.

One seed; how far it can be trusted is told by the seeds of study_presets.py,
which has to be run first.

    python sweep.py config/study_walk.py --jobs 2
"""

base = 'config/study.py'
walk_from = 'gpt2'
walk_to = 'qwen3'
equal_params = 800_000    # non-embedding: untying adds to the total alone
tune = {'learning_rate': [5e-4, 1e-3, 2e-3, 4e-3]}
tune_iters = 250
spread_from = 'out-sweep_study_presets'
