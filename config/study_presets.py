"""The four presets at equal parameters, each at its best rate, three seeds.

12 runs of 2.0 million tokens after 16 short ones for the rates.

    python sweep.py config/study_presets.py --jobs 2
"""

base = 'config/study.py'
grid = {'arch_preset': ['gpt2', 'llama2', 'llama3', 'qwen3']}
weight_tying = True       # 0.4 million parameters more would be half a model
equal_params = 800_000
tune = {'learning_rate': [5e-4, 1e-3, 2e-3, 4e-3]}
tune_iters = 400
seeds = 3
