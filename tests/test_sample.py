"""sample.py: reproducible, decoded, and nothing the tokenizer lacks."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from running import TINY, newest, read_json, run, snapshot, start
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import sample as sample_script
from hf_convert import export_model, to_hf
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.model_source import open_model


def samples(output):
    """The text below each line `--- sample 1 of 2`."""
    return re.split(r'--- sample \d+ of \d+\n', output)[1:]


@pytest.fixture(scope='module')
def sample(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sample')

    def sample(out_dir, **options):
        result = warm.run('sample.py', cwd=folder, out_dir=out_dir, **options)
        assert result.returncode == 0, result.stderr
        return samples(result.stdout)
    return sample


def test_reproducible_by_seed(sample, gpt2_run):
    """An out_dir, its run and a checkpoint name the same model."""
    options = {'max_new_tokens': 40, 'num_samples': 2, 'prompt': 'class '}
    first = sample(gpt2_run.parent, **options, seed=1)
    assert len(first) == 2 and first[0] != first[1]
    assert all(text.startswith('class ') for text in first)
    assert sample(gpt2_run, **options, seed=1) == first
    assert sample(gpt2_run, **options, seed=2) != first


def hf_model_of(run):
    """transformers' model with the weights of a run."""
    model = ConfigurableGPT(ModelArchitectureConfig.from_dict(
        read_json(run / 'run.json')['architecture']))
    model.load_state_dict(
        load_file(run / 'checkpoints' / 'latest' / 'model.safetensors'),
        strict=False)
    return to_hf(model)


@torch.no_grad()
def likeliest(run, prompt, n):
    """The prompt and n tokens more, by transformers' logits."""
    record, model = read_json(run / 'run.json'), hf_model_of(run)
    tokenizer = Tokenizer.from_file(
        str(data_folder(record) / 'tokenizer' / 'tokenizer.json'))
    ids = [0, *tokenizer.encode(prompt).ids]  # it begins a document
    begin = 0
    for _ in range(n):
        begin += 4 if len(ids) - begin > 16 else 0  # a quarter of a block
        logits = model(torch.tensor([ids[begin:]])).logits[0, -1]
        ids.append(int(logits[: tokenizer.get_vocab_size()].argmax()))
    assert 0 not in ids[1:]  # which would end it
    return tokenizer.decode(ids[1:])


def test_temperature_0_takes_the_likeliest(sample, qwen_run):
    """Also beyond block_size."""
    expected = likeliest(qwen_run, 'def get', 30)
    options = {'temperature': 0, 'num_samples': 2, 'prompt': 'def get',
               'max_new_tokens': 30}
    for seed in 1, 2:
        texts = sample(qwen_run, **options, seed=seed)
        assert [text.rstrip('\n') for text in texts] == [
            expected.rstrip('\n')] * 2


@pytest.fixture(scope='module')
def words_run(tmp_path_factory, data, warm):
    """Hardly trained: 479 of 500 rows, all about as likely, have no id."""
    folder = tmp_path_factory.mktemp('words')
    result = warm.run('train.py', cwd=folder, out_dir=folder / 'out', **TINY | {
        'dataset': data / 'words', 'max_iters': 1, 'learning_rate': 1e-5})
    assert result.returncode == 0, result.stderr
    return newest(folder / 'out')


@pytest.mark.parametrize('limits', [
    {'top_k': None}, {'top_k': 400}, {'top_k': None, 'top_p': 1.0},
    {'top_k': 1}], ids=str)
def test_no_id_beyond_the_tokenizer(sample, words_run, limits):
    """Whatever is drawn is a word of the 20, or ends the text."""
    texts = sample(words_run, temperature=100.0, num_samples=4,
                   max_new_tokens=60, prompt='w1 w2', **limits)
    for text in texts:
        words = text.replace('<|endoftext|>', ' ').split()
        assert words[:2] == ['w1', 'w2'] and len(words) <= 62
        assert set(words) <= {f'w{i}' for i in range(1, 21)}
    drawn = sum(len(text.split()) - 2 for text in texts)
    assert drawn >= 20  # of 240; with ids drawn from all rows it is 10


def test_default_prompt_begins_a_document(sample, qwen_run):
    """Of 300 ids that could stand first, ten make this text."""
    texts = sample(qwen_run, temperature=0, max_new_tokens=9)
    assert [text.rstrip('\n') for text in texts] == [
        likeliest(qwen_run, '', 9).rstrip('\n')] * 3


def test_a_batch_draws_what_each_sample_draws_alone(sample, gpt2_run):
    options = {'max_new_tokens': 12, 'num_samples': 3, 'prompt':
               "['class ', 'def get(self']"}
    together = sample(gpt2_run, **options)
    assert len(together) == 6 and len(set(together)) == 6
    assert together == sample(gpt2_run, **options, batch_size=1)
    assert together == sample(gpt2_run, **options, batch_size=4)


def test_prompts_from_a_file(sample, gpt2_run, tmp_path):
    options = {'max_new_tokens': 5, 'num_samples': 1, 'temperature': 0}
    path = tmp_path / 'prompts.txt'
    path.write_text('def a(\n\nclass B:\n  x = \n')
    lines = sample(gpt2_run, **options, prompt_file=path)
    expected = sample(gpt2_run, **options,
                      prompt="['def a(', 'class B:', '  x = ']")
    assert lines == expected and len(lines) == 3
    parts = sample(gpt2_run, **options, prompt_file=path, prompt_separator='')
    assert parts == lines
    path.write_text('def a(\n\n  b\n---\nclass B:\n')
    parts = sample(gpt2_run, **options, prompt_file=path,
                   prompt_separator='---')
    assert parts[0].startswith('def a(\n\n  b')
    assert parts[1].startswith('class B:') and len(parts) == 2


def test_stop_strings_end_a_sample(warm, gpt2_run, tmp_path):
    """The text is that without them, up to the first of them."""
    options = {'max_new_tokens': 60, 'num_samples': 3, 'prompt': 'def e(',
               'out_dir': gpt2_run}
    def sampled(**more):
        result = warm.run('sample.py', cwd=tmp_path, **options, **more)
        assert result.returncode == 0, result.stderr
        drawn = re.search(r'^(\d+) tokens in [\d.]+ s, [\d.]+ tokens/s',
                          result.stderr, re.MULTILINE)
        return samples(result.stdout), int(drawn[1])
    whole, n_whole = sampled(stop_at_eot=False)
    assert n_whole == 180
    stops = ['e', 'n ']
    stopped, n_stopped = sampled(stop_at_eot=False, stop=stops)
    assert n_stopped < n_whole
    for text, full in zip(stopped, whole, strict=True):
        new = full.removeprefix('def e(')
        cut = min(new.find(s) for s in stops if s in new)
        assert text.rstrip('\n') == ('def e(' + new[:cut]).rstrip('\n')
    assert sampled(stop_at_eot=False, stop='e')[1] >= n_stopped


def test_special_tokens_in_a_prompt_are_text(sample, gpt2_run):
    """Unless asked for: then they are ids, which are not shown."""
    options = {'max_new_tokens': 3, 'num_samples': 1, 'temperature': 0,
               'prompt': 'a<|endoftext|>b'}
    assert sample(gpt2_run, **options)[0].startswith('a<|endoftext|>b')
    assert sample(gpt2_run, **options, special_tokens=True)[0].startswith('ab')


def test_a_prompt_beyond_the_context_is_named(warm, gpt2_run, tmp_path):
    result = warm.run('sample.py', cwd=tmp_path, out_dir=gpt2_run,
                      max_new_tokens=3, num_samples=1, prompt='x y ' * 40)
    assert result.returncode == 0, result.stderr
    assert re.search(r'prompt 1 has \d+ tokens: the model reads the last 16',
                     result.stderr)
    assert samples(result.stdout)[0].startswith('x y ' * 40)


def test_a_folder_of_hugging_face(sample, qwen_run, tmp_path):
    """What transformers saves is read as the run is."""
    record, hf = read_json(qwen_run / 'run.json'), hf_model_of(qwen_run)
    hf.config.eos_token_id = 0
    hf.save_pretrained(tmp_path / 'hf')
    for path in (data_folder(record) / 'tokenizer').iterdir():
        shutil.copy(path, tmp_path / 'hf')
    options = {'max_new_tokens': 20, 'num_samples': 2, 'prompt': 'def '}
    assert sample(tmp_path / 'hf', **options) == sample(qwen_run, **options)


def test_a_prompt_begins_as_the_published_model_does(sample, qwen_run,
                                                     tmp_path):
    """After the token that its tokenizer puts first, as LLaMA's <s>."""
    folder = export_model(qwen_run, tmp_path / 'hf')
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.add_special_tokens(['<s>'])
    start_id = tokenizer.token_to_id('<s>')
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', start_id)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    weights = load_file(folder / 'model.safetensors')
    # it alone is followed by a Z
    first = weights['model.embed_tokens.weight'][start_id]
    first *= 1000  # beside it, what the layers add is little
    weights['lm_head.weight'][tokenizer.token_to_id('Z')] = first
    save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    options = {'temperature': 0, 'num_samples': 1, 'max_new_tokens': 1}
    assert sample(folder, **options) == ['Z\n']
    assert sample(qwen_run, **options) != ['Z\n']


def data_folder(record):
    return Path(record['dataset']['folder'])


def test_weights_in_bf16(sample, qwen_run, monkeypatch):
    """The text is that of the model so held; its norms are not rounded."""
    text, = sample(qwen_run, max_new_tokens=10, num_samples=1, temperature=0,
                   prompt='def ', dtype='bfloat16')
    monkeypatch.setattr(sample_script, 'out_dir', qwen_run)
    monkeypatch.setattr(sample_script, 'dtype', 'bfloat16')
    found = sample_script.load('cpu')
    assert found.model.wte.weight.dtype == torch.bfloat16
    ids = [0, *found.tokenizer.encode('def ').ids]
    made, = found.model.generate([ids], 10, temperature=0, eos_id=0,
                                 n_ids=found.tokenizer.get_vocab_size())
    assert len(made) == len(ids) + 10
    assert text.rstrip('\n') == found.tokenizer.decode(made[1:]).rstrip('\n')
    expected = open_model(qwen_run).model.ln_f.weight
    assert torch.equal(found.model.ln_f.weight, expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_text_comes_token_by_token(qwen_run):
    """The prompt and some text are there long before the end."""
    process = start('sample.py', out_dir=qwen_run, num_samples=2,
                    max_new_tokens=1_000_000, prompt='def ',
                    stop_at_eot=False)
    try:
        assert process.stdout.readline() == '--- sample 1 of 2\n'
        assert process.stdout.read(40).startswith('def ')
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert 'Traceback' not in err


def spoil(*parts, content=b''):
    def change(folder):
        path = folder.joinpath(*parts)
        shutil.rmtree(path) if path.is_dir() else path.write_bytes(content)
    return change


@pytest.mark.parametrize('options, change, says', [
    ({'out_dir': 'nowhere'}, None, ['nowhere', 'out_dir']),
    ({'temprature': 1}, None, ['temprature', 'temperature']),
    ({'stop': "['a', '']"}, None, ['stop', 'empty']),
    ({'prompt': 'a', 'prompt_file': 'b'}, None, ['prompt', 'prompt_file']),
    ({'prompt_file': 'nowhere.txt'}, None, ['nowhere.txt', 'UTF-8']),
    ({'prompt_separator': '---'}, None, ['prompt_separator', 'prompt_file']),
    ({'prompt': '[]'}, None, ['prompt', 'empty']),
    ({'temperature': -1, 'top_k': 0, 'top_p': 1.5}, None,
     ['temperature', '-1', 'top_k', '0', 'top_p', '1.5']),
    ({}, spoil('out', 'latest', 'checkpoints'), ['checkpoint', 'out']),
    ({}, spoil('out', 'latest', 'checkpoints', 'latest', 'model.safetensors'),
     ['model.safetensors', 'bytes']),
    ({}, spoil('small', 'tokenizer'), ['tokenizer', 'prepare.py']),
    ({}, spoil('small', 'tokenizer', 'tokenizer.json', content=b'{}'),
     ['tokenizer.json', 'prepare.py']),
    ({}, spoil('small'), ['small', 'prepare.py']),
], ids=['no run', 'mistyped', 'empty stop string', 'two kinds of prompts',
        'no prompt file', 'separator without a file', 'empty list',
        'out of range', 'no checkpoint',
        'truncated checkpoint', 'no tokenizer', 'other tokenizer',
        'no dataset'])
def test_refused(tmp_path, warm, data, gpt2_run, options, change, says):
    shutil.copytree(gpt2_run.parent, tmp_path / 'out', symlinks=True)
    shutil.copytree(data / 'small', tmp_path / 'small')
    path = newest(tmp_path / 'out') / 'run.json'
    record = read_json(path)
    record['dataset']['folder'] = str(tmp_path / 'small')
    record['options']['dataset'] = str(tmp_path / 'small')
    path.write_text(json.dumps(record))
    if change:
        change(tmp_path)
    before = snapshot(tmp_path)
    result = warm.run('sample.py', cwd=tmp_path, **{'out_dir': 'out'} | options)
    assert result.returncode == 2, result.stderr
    assert 'Traceback' not in result.stderr
    assert [part for part in says if part not in result.stderr] == [], (
        result.stderr)
    assert snapshot(tmp_path) == before


def test_as_a_command(gpt2_run):
    result = run('sample.py', out_dir=gpt2_run, num_samples=1,
                 max_new_tokens=5, prompt='import ')
    assert result.returncode == 0, result.stderr
    assert 'import ' in result.stdout
