"""eval.py: exact bits per byte, and lm-eval's numbers without an export."""

import json
import math
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch
from running import (
    TINY,
    newest,
    read_json,
    read_lines,
    run,
    snapshot,
)

from hf_convert import to_hf
from training.dataset import open_dataset
from training.evaluation import sliding_windows
from training.model_source import open_model

CONTEXT = 16  # block_size of the runs
ODD = ('def naïve(λ):\r\n\treturn "e\u0301 \U0001f469\u200d\U0001f4bb"\x00\n'
       '\ufeff<|endoftext|> 你好 ' + 'class Model:\n    pass\n\n' * 6)
TASKS = 'tiny_choice', 'tiny_rolling', 'tiny_generation'


def exported(run_folder):
    """The transformers model of a run, and the run's tokenizer."""
    opened = open_model(run_folder)
    return to_hf(opened.model), opened.tokenizer


@pytest.fixture
def copied(tmp_path, qwen_run):
    """A copy of a run, since results are written beside it."""
    shutil.copytree(qwen_run.parent, tmp_path / 'out', symlinks=True)
    return newest(tmp_path / 'out')


@pytest.fixture
def evaluate(tmp_path, warm):
    def evaluate(*arguments, status=0, **options):
        result = warm.run('eval.py', *arguments, cwd=tmp_path, **options)
        assert result.returncode == status, result.stderr
        assert 'Traceback' not in result.stderr
        return result.stdout if status == 0 else result.stderr
    return evaluate


def results_of(run_folder):
    return [json.loads(line) for line in
            (run_folder / 'evals.jsonl').read_text().splitlines()]


# --- the validation split ----------------------------------------------------


@pytest.mark.parametrize('source', ['gpt2_run', 'qwen_run'])
def test_validation_equals_the_runs_own(tmp_path, evaluate, source, request):
    """An out_dir, its run and a checkpoint name the same; no other file of
    the run changes, and results are added to those before."""
    source = request.getfixturevalue(source)
    shutil.copytree(source.parent, tmp_path / 'out', symlinks=True)
    folder = newest(tmp_path / 'out')
    before = snapshot(folder / 'checkpoints') | {
        name: (folder / name).read_bytes()
        for name in ('run.json', 'metrics.jsonl')}
    outputs = [evaluate('out'), evaluate(out_dir=folder),
               evaluate(folder / 'checkpoints' / 'latest', '--batch_size', 3)]
    last = [r for r in read_lines(folder) if r['kind'] == 'eval'][-1]
    results = results_of(folder)
    assert len(results) == 3
    for output, result in zip(outputs, results, strict=True):
        assert result['step'] == last['step']
        assert result['bpb'] == pytest.approx(last['val_bpb'], abs=1e-6)
        assert result['loss'] == pytest.approx(last['val_loss'], abs=1e-6)
        assert result['perplexity'] == math.exp(result['loss'])
        assert f"{last['val_bpb']:.4f}" in output
    assert before == snapshot(folder / 'checkpoints') | {
        name: (folder / name).read_bytes()
        for name in ('run.json', 'metrics.jsonl')}


def test_more_of_it(evaluate, copied):
    """Another eval_bytes is another text: the direct sum over its tokens."""
    evaluate('out', eval_bytes=900, json='all.json')
    result = read_json(copied.parent.parent / 'all.json')[0]
    model, _ = exported(copied)
    record = read_json(copied / 'run.json')
    split = open_dataset(record['dataset']['folder']).split('val')
    n = 2  # documents of at most 900 bytes
    assert split.document_bytes[:n].sum() <= 900 < (
        split.document_bytes[:n + 1].sum())
    ids = [0, *split.read(0, int(split.document_tokens[:n].sum()))]
    nats = sum(nats_of(model, ids[at:at + CONTEXT + 1])
               for at in range(0, len(ids) - 1, CONTEXT))
    assert result['bytes'] == split.document_bytes[:n].sum()
    assert result['bpb'] == pytest.approx(
        nats / math.log(2) / result['bytes'], rel=1e-6)


# --- text --------------------------------------------------------------------


@torch.no_grad()
def nats_of(model, ids):
    """Of ids[1:], in one window."""
    logp = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return -logp.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()


@torch.no_grad()
def token_by_token(model, ids, context, stride):
    """Each token alone, in a row of its own: what it may see ends just before
    it, and begins where the window does that it is the first to reach."""
    rows = defaultdict(list)  # by length: a batch of each
    for at in range(1, len(ids)):
        moves = max(0, math.ceil((at - context) / stride))
        end = min(context + moves * stride, len(ids) - 1)
        seen = ids[max(0, end - context):at]
        rows[len(seen)].append([*seen, ids[at]])
    nats = 0.0
    for batch in map(torch.tensor, rows.values()):
        logits = model(batch[:, :-1]).logits[:, -1].double()
        nats -= logits.log_softmax(-1).gather(1, batch[:, -1:]).sum().item()
    return nats


def ids_of(tokenizer, text):
    """Between two ends of text; what looks like a special token is text."""
    pieces = text.split('<|endoftext|>')
    ids = tokenizer.encode(pieces[0]).ids
    for piece in pieces[1:]:
        for part in '<', '|', 'endoftext', '|', '>':
            ids += tokenizer.encode(part).ids
        ids += tokenizer.encode(piece).ids
    return [0, *ids, 0]


@pytest.mark.parametrize('options', [
    {}, {'stride': 1}, {'stride': 5}, {'stride': 16},
    {'context': 7, 'stride': 3}, {'context': 1}], ids=str)
def test_text_equals_token_by_token(tmp_path, evaluate, copied, options):
    """Two files at once, one of them shorter than a window."""
    texts = {'odd.txt': ODD, 'short.txt': 'é'}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    given = [part for name, value in options.items()
             for part in (f'--{name}', value)]
    evaluate('out', '--text', *texts, *given)
    model, tokenizer = exported(copied)
    context = options.get('context', CONTEXT)
    stride = options.get('stride', max(1, context // 2))
    for result, (name, text) in zip(results_of(copied), texts.items(),
                                    strict=True):
        ids = ids_of(tokenizer, text)
        nats = token_by_token(model, ids, context, stride)
        assert (result['path'], result['tokens'], result['bytes']) == (
            name, len(ids) - 1, len(text.encode()))
        assert result['bpb'] == pytest.approx(
            nats / (math.log(2) * len(text.encode())), rel=1e-6)
        assert result['perplexity'] == pytest.approx(
            math.exp(nats / (len(ids) - 1)), rel=1e-5)


@pytest.mark.parametrize('context', [1, 2, 7])
def test_windows(context):
    """Every target once, and each with what the stride allows it to see."""
    for stride in range(1, context + 1):
        for n in range(1, 30):
            windows = list(sliding_windows(n, context, stride))
            scored = [at for _, first, end in windows
                      for at in range(first, end)]
            assert scored == list(range(n))
            for start, first, end in windows:
                assert 0 <= start <= first and end - start <= context
                assert first - start + 1 >= min(first + 1,
                                                context - stride + 1)
    for stride in 0, context + 1:
        with pytest.raises(ValueError, match=f'stride={stride}'):
            list(sliding_windows(9, context, stride))


# --- Hugging Face folders, and what is refused --------------------------------


def export(run_folder, folder):
    from transformers import PreTrainedTokenizerFast
    model, tokenizer = exported(run_folder)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|endoftext|>',
        pad_token='<|endoftext|>').save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def hf_folder(qwen_run, tmp_path_factory):
    return export(qwen_run, tmp_path_factory.mktemp('hf') / 'exported')


def test_a_hugging_face_folder_equals_its_run(tmp_path, evaluate, copied,
                                              hf_folder):
    (tmp_path / 'a.txt').write_text(ODD)
    small = read_json(copied / 'run.json')['dataset']['folder']
    before = snapshot(hf_folder)
    given = ('--text', 'a.txt', '--dataset', small, '--eval_bytes', 1500)
    evaluate('out', *given, '--json', 'run.json')
    evaluate(hf_folder, *given, '--json', 'hf.json')
    assert snapshot(hf_folder) == before  # it is no run
    ours, theirs = (read_json(tmp_path / f'{name}.json')
                    for name in ('run', 'hf'))
    assert [r['kind'] for r in theirs] == ['validation', 'text']
    for a, b in zip(ours, theirs, strict=True):
        assert b['step'] is None and b['tokens'] == a['tokens']
        assert b['bpb'] == pytest.approx(a['bpb'], rel=1e-6)


def test_all_texts_that_cannot_be_scored(tmp_path, evaluate, copied):
    (tmp_path / 'empty').write_bytes(b'')
    (tmp_path / 'latin').write_bytes('na\xefve'.encode('latin-1'))
    before = snapshot(copied)
    error = evaluate('out', '--text', 'empty', 'latin', 'absent', status=2)
    for part in 'empty is empty', 'latin is no UTF-8', 'byte 2', 'absent':
        assert part in error
    assert snapshot(copied) == before


@pytest.mark.parametrize('arguments, says', [
    (['nowhere'], ['nowhere', 'does not exist']),
    (['empty'], ['empty', 'out_dir']),
    (['out', '--context', 17], ['context=17', '16']),
    (['out', '--context', 8, '--stride', 9, '--text', 'a'], ['stride=9']),
    (['out', '--stride', 0], ['stride', '>= 1']),
    (['out', '--text'], ['--text']),
    (['out', '--strid', 3], ['strid', 'stride']),
    (['out', '--dataset', 'words'], ['words', 'tokenizer', '--text']),
    (['out', '--dataset', 'nowhere/at/all'], ['nowhere/at/all']),
    (['hf'], ['--dataset', '--text', '--tasks']),
], ids=['no folder', 'empty folder', 'context', 'stride', 'stride 0',
        'text without files', 'mistyped', 'other tokenizer', 'no dataset',
        'nothing to evaluate on'])
def test_refused(tmp_path, evaluate, copied, data, hf_folder, arguments, says):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'a').write_text('def')
    places = {'words': data / 'words', 'hf': hf_folder}
    before = snapshot(copied)
    error = evaluate(*(places.get(a, a) for a in arguments), status=2)
    assert [part for part in says if part not in error] == [], error
    assert snapshot(copied) == before


def test_damaged_weights_are_refused(evaluate, copied):
    path = copied / 'checkpoints' / 'latest' / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-4])
    assert 'damaged' in evaluate('out', status=2)


def test_a_dataset_that_has_changed(evaluate, copied):
    record = read_json(copied / 'run.json')
    record['dataset']['fingerprint'] = '0' * 64
    (copied / 'run.json').write_text(json.dumps(record))
    assert 'has changed' in evaluate('out', status=2)


@pytest.mark.parametrize('taken', ['evals.jsonl', 'all.json'])
def test_results_that_cannot_be_written_are_printed(tmp_path, warm, copied,
                                                    taken):
    (copied / taken).mkdir()
    result = warm.run('eval.py', 'out', cwd=tmp_path, json=copied / 'all.json')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    last = [r for r in read_lines(copied) if r['kind'] == 'eval'][-1]
    assert f"{last['val_bpb']:.4f}" in result.stdout
    assert 'warning' in result.stderr and taken in result.stderr
    # the other of the two is there
    other = {'evals.jsonl', 'all.json'} - {taken}
    assert (copied / other.pop()).is_file()


def test_results_before_an_error_are_kept(tmp_path, evaluate, copied):
    """Of the dataset, where the tokenizer makes nothing of the text."""
    record = read_json(copied / 'run.json')
    (tmp_path / 'text').write_text('def')
    error = evaluate('out', '--dataset', record['dataset']['folder'],
                     '--text', 'text', '--stride', 99, status=2)
    assert 'stride=99' in error
    assert [r['kind'] for r in results_of(copied)] == ['validation']


def test_a_run_on_ids_alone(tmp_path, evaluate, warm):
    """nanoGPT's format has no tokenizer: its own dataset needs none."""
    (tmp_path / 'ids').mkdir()
    for split in 'train', 'val':
        (np.arange(400) % 50).astype(np.uint16).tofile(
            tmp_path / 'ids' / f'{split}.bin')
    result = warm.run('train.py', cwd=tmp_path, out_dir='ids_run', **TINY | {
        'dataset': tmp_path / 'ids', 'vocab_size': 50304, 'max_iters': 1})
    assert result.returncode == 0, result.stderr
    run_folder = newest(tmp_path / 'ids_run')
    last = [r for r in read_lines(run_folder) if r['kind'] == 'eval'][-1]
    evaluate('ids_run')
    result, = results_of(run_folder)
    assert result['loss'] == pytest.approx(last['val_loss'], abs=1e-6)
    assert result['bpb'] is None
    (tmp_path / 'text').write_text('def')
    for arguments in ('--text', 'text'), ('--dataset', 'ids', '--text',
                                          'text'):
        error = evaluate('ids_run', *arguments, status=2)
        assert 'no tokenizer' in error


def test_without_lm_eval(tmp_path, copied):
    """Said before anything is computed."""
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'lm_eval.py').write_text(
        "raise ModuleNotFoundError('no lm_eval')")
    before = snapshot(copied)
    result = run('eval.py', copied, tasks='arc_easy', cwd=tmp_path, env={
        'PYTHONPATH': str(tmp_path / 'none')})
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'pip install -r requirements-eval.txt' in result.stderr
    assert snapshot(copied) == before


# --- downstream tasks --------------------------------------------------------


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A folder of three tasks with the questions they ask."""
    pytest.importorskip('lm_eval')
    folder = tmp_path_factory.mktemp('tasks')
    words = 'class Model def return self None import config'.split()
    lines = [{
        'question': ' '.join(words[(i + j) % 8] for j in range(2 + 3 * i)),
        'choices': [words[i], f'{words[i + 1]}:\n    pass', 'A', 'B'],
        'answer': i % 4, 'word': words[i + 2],
        'text': ODD[:30 * i + 7]} for i in range(5)]
    (folder / 'questions.json').write_text(
        ''.join(json.dumps(line) + '\n' for line in lines))
    shared = {
        'dataset_path': 'json', 'test_split': 'train',
        'fewshot_split': 'train', 'metadata': {'version': 1.0},
        'dataset_kwargs': {
            'data_files': {'train': str(folder / 'questions.json')},
            'cache_dir': str(folder / 'cache')}}
    kinds = {
        'tiny_choice': {
            'output_type': 'multiple_choice', 'doc_to_text': '{{question}}',
            'doc_to_choice': '{{choices}}', 'doc_to_target': '{{answer}}',
            'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]},
        'tiny_rolling': {
            'output_type': 'loglikelihood_rolling', 'doc_to_text': '',
            'doc_to_target': '{{text}}',
            'metric_list': [{'metric': 'word_perplexity'},
                            {'metric': 'bits_per_byte'}]},
        'tiny_generation': {
            'output_type': 'generate_until', 'doc_to_text': '{{question}}',
            'doc_to_target': '{{word}}',
            'generation_kwargs': {'until': ['\n', ':'], 'do_sample': False,
                                  'max_gen_toks': 9},
            'metric_list': [{'metric': 'exact_match'}]}}
    for name, kind in kinds.items():  # JSON is YAML
        (folder / f'{name}.yaml').write_text(
            json.dumps({'task': name} | shared | kind))
    return folder


@pytest.fixture(scope='module')
def theirs(hf_folder, tasks):
    """What lm-eval's own model says, for 0 and 1 examples before a question:
    {shots: (results, samples)}."""
    pytest.importorskip('accelerate')
    from lm_eval.models.huggingface import HFLM
    model = HFLM(str(hf_folder), device='cpu', batch_size=3, dtype='float32')
    return {n: told(model, tasks, n) for n in (0, 1)}


def told(model, tasks, num_fewshot):
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    loaded = TaskManager(include_path=str(tasks),
                         include_defaults=False).load(list(TASKS))
    for task in loaded['tasks'].values():
        task.set_config(key='num_fewshot', value=num_fewshot)
        task.set_fewshot_seed(seed=1234)
    found = evaluate(model, loaded)
    return found['results'], found['samples']


@pytest.mark.slow
@pytest.mark.parametrize('shots', [0, 1])
def test_each_request_equals_lm_evals_own_model(qwen_run, tasks, theirs,
                                                shots):
    from training.lm_eval_adapter import Adapter
    opened = open_model(qwen_run)
    adapter = Adapter(
        opened.model, opened.tokenizer, eot_id=0, start_id=0,
        special_tokens=False, max_length=CONTEXT, batch_size=4,
        device=torch.device('cpu'), dtype='float32')
    results, samples = told(adapter, tasks, shots)
    found = []
    for task in TASKS:
        for ours, his in zip(samples[task], theirs[shots][1][task],
                             strict=True):
            assert ours['arguments'] == his['arguments']
            for a, b in zip(ours['resps'], his['resps'], strict=True):
                a, b = answers(a), answers(b)
                assert a == (b if isinstance(b, str) else pytest.approx(
                    b, abs=1e-5, rel=1e-6))
                found.append(a)
    assert len(set(map(str, found))) > 20  # they are not all the same
    for task in TASKS:
        for key, value in theirs[shots][0][task].items():
            if isinstance(value, float):
                assert results[task][key] == pytest.approx(value, rel=1e-5)


def answers(responses):
    """Log-likelihoods and whether they are greedy; a text as it is."""
    response = responses[0]
    return list(response) if isinstance(response, tuple) else response


@pytest.mark.slow
def test_tasks_by_command(evaluate, copied, tasks, theirs):
    output = evaluate('out', '--tasks', ','.join(TASKS), '--include_path',
                      tasks, '--num_fewshot', 1)
    results = results_of(copied)
    assert [r['task'] for r in results] == list(TASKS)
    for result in results:
        his = theirs[1][0][result['task']]
        assert {f'{name},none': pytest.approx(value, rel=1e-5)
                for name, value in result['metrics'].items()} == {
            key: value for key, value in his.items()
            if key.endswith(',none') and '_stderr' not in key}
        assert (result['questions'], result['num_fewshot']) == (5, 1)
        assert result['task'] in output
    evaluate('out', '--tasks', 'tiny_choice', '--include_path', tasks,
             '--limit', 2)
    last = results_of(copied)[-1]
    assert (last['questions'], last['limit'], last['num_fewshot']) == (2, 2, 0)


@pytest.mark.slow
def test_unknown_tasks(evaluate, copied, tasks):
    """All of lm-eval's own are read before a task is called unknown."""
    error = evaluate('out', '--tasks', 'tiny_choise,hellaswagg',
                     '--include_path', tasks, status=2)
    assert 'tiny_choise; did you mean tiny_choice' in error
    assert 'hellaswagg; did you mean hellaswag' in error
    assert not (copied / 'evals.jsonl').exists()


@pytest.mark.slow
def test_include_path_that_is_no_folder(evaluate, copied, tasks):
    error = evaluate('out', '--tasks', 'a', '--include_path', 'nowhere',
                     status=2)
    assert 'include_path=nowhere' in error


@pytest.mark.slow
def test_a_task_that_needs_more_than_the_context(evaluate, copied, tasks):
    path = tasks / 'tiny_long.yaml'
    long = read_json(tasks / 'tiny_generation.yaml')
    long['task'] = 'tiny_long'
    long['generation_kwargs']['max_gen_toks'] = CONTEXT
    path.write_text(json.dumps(long))
    error = evaluate('out', '--tasks', 'tiny_long', '--include_path', tasks,
                     status=2)
    assert 'max_gen_toks' in error and str(CONTEXT) in error
