"""hf_convert.py: official layouts in, folders that others load out, and
nothing that only looks whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from forks import run_forked
from running import (
    ROOT,
    SYSTEM,
    newest,
    read_json,
    read_lines,
    snapshot,
    whole_tensors,
)
from safetensors.torch import load_file, save_file
from test_parity import build
from tokenizers import Tokenizer

import hf_convert
from hf_convert import export_model, import_model
from training.hf_config import ConversionError
from training.model_source import SourceError, find_source, open_model
from training.tensor_files import INDEX, SINGLE, TensorFileError
from training.whole_folder import OutputError, whole_folder

PRESETS = {
    'gpt2': {}, 'llama2': {}, 'qwen3': {'head_dim': 8, 'weight_tying': True},
    'llama3': {'num_key_value_heads': 2, 'rope_scaling': json.dumps({
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 16})}}
TEXT = 'def get(self):\n    return self.rope_theta  # 12'


@pytest.fixture(scope='module')
def trained(warm, data, tmp_path_factory):
    """{preset: the run folder of five updates}, exported at the end."""
    folder, found = tmp_path_factory.mktemp('trained'), {}
    for preset, options in PRESETS.items():
        result = warm.run(
            'train.py', cwd=folder, out_dir=folder / preset, **SYSTEM,
            arch_preset=preset, dataset=data / 'small', n_layer=2, n_embd=32,
            n_head=4, d_ff=48, block_size=32, max_iters=5, batch_size=2,
            learning_rate=1e-2, eval_bytes=2000, export_hf_at_end=True,
            **options)
        assert result.returncode == 0, result.stderr
        found[preset] = newest(folder / preset)
    return found


@pytest.mark.parametrize('preset', PRESETS)
def test_transformers_loads_the_export(trained, preset):
    """Logits and ids equal; the pipeline's text is our likeliest."""
    run = trained[preset]
    hf = transformers.AutoModelForCausalLM.from_pretrained(run / 'hf')
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / 'hf')
    ours = open_model(run)
    ids = ours.tokenizer.encode(TEXT).ids
    assert tokenizer(TEXT).input_ids == ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id == ours.eot_id == 0
    x = torch.tensor([ids[:32]])
    with torch.no_grad():
        expected = ours.model(x)[0]
        difference = (hf(x).logits - expected).abs().max().item()
    assert expected.std() > 0.1 and difference < 1e-5
    out = transformers.pipeline('text-generation', model=str(run / 'hf'))(
        'def get', max_new_tokens=8, do_sample=False,
        return_full_text=False)[0]['generated_text']
    start = ours.tokenizer.encode('def get').ids
    made = ours.model.generate(torch.tensor([start]), 8, temperature=0)[0]
    assert out == ours.tokenizer.decode(made[len(start):].tolist())


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('size', ['5GB', '10KB'])
def test_export_then_import_is_exact(trained, tmp_path, preset, size):
    run = trained[preset]
    export_model(run, tmp_path / 'hf', max_shard_size=size)
    assert (tmp_path / 'hf' / INDEX).exists() == (size == '10KB')
    imported = import_model(tmp_path / 'hf', tmp_path / 'back',
                            max_shard_size=size)
    expected = {key: tensor for key, tensor in whole_tensors(
        run / 'checkpoints' / 'latest').items() if key[0] == 'model'}
    found = whole_tensors(imported)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert find_source(imported).config.to_dict() == (
        read_json(run / 'run.json')['architecture'] | {
            'attention_backend': find_source(
                imported).config.attention_backend})


def test_all_names_of_a_model_open_it(trained, tmp_path):
    """An out_dir, run, checkpoint, its link, export and import: one model."""
    run = trained['qwen3']
    import_model(run / 'hf', tmp_path / 'imported')
    x = torch.arange(20)[None]
    first = None
    for path in (run.parent, run, run / 'checkpoints' / 'step_00000005',
                 run / 'checkpoints' / 'latest', run / 'hf',
                 tmp_path / 'imported', f'hf:{run / "hf"}'):
        found = open_model(path, attention_backend='eager')
        logits = found.model(x)[0]
        first = logits if first is None else first
        assert torch.equal(logits, first), path
        assert (found.eot_id, found.tokenizer.encode(TEXT).ids) == (
            0, open_model(run).tokenizer.encode(TEXT).ids)
        assert not found.model.training


def test_model_card_and_configs(trained, tmp_path):
    run = trained['llama3']
    out = export_model(run, tmp_path / 'my-model', dtype='bfloat16')
    card, record = (out / 'README.md').read_text(), read_json(run / 'run.json')
    bpb = [r['val_bpb'] for r in read_lines(run) if r['kind'] == 'eval'][-1]
    for part in ('# my-model', record['architecture_name'], 'small',
                 f'{5 * record["tokens_per_iter"]:,} tokens', f'{bpb:.4f}',
                 'python train.py', str(record['commit'])):
        assert part in card, part
    config = read_json(out / 'config.json')
    assert config['architectures'] == ['LlamaForCausalLM']
    assert config['dtype'] == 'bfloat16'
    assert config['rope_scaling']['factor'] == 8.0
    assert read_json(out / 'generation_config.json')['eos_token_id'] == 0
    assert {t.dtype for t in load_file(out / SINGLE).values()} == {
        torch.bfloat16}
    files = {path.name for path in out.iterdir()}
    assert files == {'config.json', 'generation_config.json', 'README.md',
                     SINGLE, 'tokenizer.json', 'tokenizer_config.json'}


@pytest.mark.parametrize('init_from, told', [
    ('scratch', False), ('auto', False), ('hf:some/model', True)])
def test_model_card_says_what_was_begun_from(trained, tmp_path, init_from,
                                             told):
    run = changed_record(trained['gpt2'], tmp_path, lambda record: record[
        'options'].update(init_from=init_from))
    card = (export_model(run, tmp_path / 'hf') / 'README.md').read_text()
    assert ('begun from' in card) == told


@pytest.mark.parametrize('preset', ['gpt2', 'llama3'])
def test_check_against_transformers(trained, tmp_path, capsys, preset):
    (tmp_path / 'text').write_text(TEXT)
    folder = str(trained[preset] / 'hf')
    hf_convert.main(['check', folder, str(tmp_path / 'text'), '--tokens=20'])
    shown = capsys.readouterr().out
    assert '20 tokens' in shown
    assert float(re.search(r'logits (\S+),', shown)[1]) < 1e-5
    ours, theirs = re.findall(r'perplexity, .*: (\S+)', shown)
    assert abs(float(ours) - float(theirs)) < 1e-3 * float(theirs)


# --- official layouts --------------------------------------------------------

GPT2_OFFICIAL = {
    'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'],
    'attn_pdrop': 0.1, 'bos_token_id': 50256, 'embd_pdrop': 0.1,
    'eos_token_id': 50256, 'initializer_range': 0.02,
    'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 256,
    'n_embd': 96, 'n_head': 4, 'n_layer': 3, 'n_positions': 256,
    'resid_pdrop': 0.1, 'vocab_size': 1000}
LLAMA_OFFICIAL = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False,
    'attention_dropout': 0.0, 'bos_token_id': 128000, 'eos_token_id': 128001,
    'hidden_act': 'silu', 'hidden_size': 96, 'intermediate_size': 256,
    'max_position_embeddings': 256, 'mlp_bias': False, 'model_type': 'llama',
    'num_attention_heads': 8, 'num_hidden_layers': 3,
    'num_key_value_heads': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-06,
    'rope_scaling': {'factor': 8.0, 'high_freq_factor': 4.0,
                     'low_freq_factor': 1.0, 'rope_type': 'llama3',
                     'original_max_position_embeddings': 64},
    'rope_theta': 500000.0, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'vocab_size': 1000}
QWEN3_OFFICIAL = {
    'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False,
    'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'head_dim': 32, 'hidden_act': 'silu',
    'hidden_size': 96, 'intermediate_size': 288,
    'max_position_embeddings': 256, 'max_window_layers': 3,
    'model_type': 'qwen3', 'num_attention_heads': 8, 'num_hidden_layers': 3,
    'num_key_value_heads': 4, 'rms_norm_eps': 1e-06, 'rope_scaling': None,
    'rope_theta': 1000000, 'sliding_window': None,
    'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
    'use_sliding_window': False, 'vocab_size': 1000}


def write_official(folder, config, state, shards=3):
    """A folder as the official ones are: an index, shards, a config."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    state = {name: t.contiguous().clone() for name, t in state.items()}
    if shards == 1:
        save_file(state, folder / SINGLE, {'format': 'pt'})
        return folder
    names, where = sorted(state), {}
    for i in range(shards):
        file = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
        save_file({n: state[n] for n in names[i::shards]}, folder / file,
                  {'format': 'pt'})
        where |= dict.fromkeys(names[i::shards], file)
    (folder / INDEX).write_text(json.dumps(
        {'metadata': {'total_size': 1}, 'weight_map': where}))
    return folder


def official(name, folder):
    """(the transformers model in fp32, its folder in the official layout)."""
    hf, _, _ = build(name)
    state = hf.state_dict()
    if name == 'gpt2':  # without the prefix, with the masks, in fp32
        state = {n.removeprefix('transformer.'): t for n, t in state.items()
                 if n != 'lm_head.weight'}
        for layer in range(3):
            state[f'h.{layer}.attn.bias'] = torch.ones(1, 1, 256, 256).tril()
        return hf, write_official(folder, GPT2_OFFICIAL, state, shards=1)
    hf = hf.bfloat16().float()
    state = {n: t.bfloat16() for n, t in hf.state_dict().items()}
    if name.startswith('llama'):
        del state['lm_head.weight']  # tied, and absent
        return hf, write_official(folder, LLAMA_OFFICIAL, state)
    return hf, write_official(folder, QWEN3_OFFICIAL, state)  # tied, present


@pytest.mark.parametrize('name', ['gpt2', 'llama3.1, scaled RoPE',
                                  'qwen3, tied'])
def test_official_layouts(tmp_path, name):
    hf, folder = official(name, tmp_path / 'official')
    out = import_model(folder, tmp_path / 'out', max_shard_size='200KB')
    source = find_source(out)
    assert source.config.weight_tying
    expected = hf_convert.from_hf(hf)
    found = whole_tensors(out)
    assert len(found) == len(list(expected.parameters()))
    for key, p in expected.named_parameters():
        assert torch.equal(found['model', key], p.detach().flatten()), key
    assert source.config.rope_scaling == expected.config.rope_scaling
    assert source.config.block_size == 256
    with pytest.raises(SourceError, match='without a tokenizer'):
        open_model(out)


@pytest.fixture
def llama(tmp_path):
    return official('llama3.1, scaled RoPE', tmp_path / 'official')[1]


def refused(path, tmp_path, error=ValueError):
    """The one error of the import, which leaves nothing behind."""
    before = snapshot(tmp_path)
    with pytest.raises(error) as caught:
        import_model(path, tmp_path / 'refused')
    assert snapshot(tmp_path).keys() == before.keys()
    return str(caught.value)


def test_folders_that_are_no_model(tmp_path, llama):
    (tmp_path / 'empty').mkdir()
    assert 'config.json' in refused(tmp_path / 'empty', tmp_path,
                                    ConversionError)
    with pytest.raises(SourceError, match='holds no run'):
        find_source(tmp_path / 'empty')
    (llama / 'config.json').write_text('{"model_type": ')
    assert 'no configuration' in refused(llama, tmp_path, ConversionError)
    assert 'no folder' in refused(tmp_path / 'absent', tmp_path)


@pytest.mark.parametrize('change, says', [
    ({'model_type': 'gpt_neox'}, ['gpt_neox', 'gpt2, llama, qwen3']),
    ({'hidden_act': 'gelu_fast'}, ['gelu_fast']),
    ({'mlp_bias': True}, ['attention_bias', 'mlp_bias']),
    ({'quantization_config': {'quant_method': 'gptq'}}, ['quantized']),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}, ['linear']),
    ({'vocab_size': 999}, ['(1000, 96)', '(999, 96)']),
    ({'num_hidden_layers': 2}, ['surplus: model.layers.2.mlp.up_proj']),
    ({'tie_word_embeddings': False}, ['missing: lm_head.weight']),
], ids=str)
def test_configurations_that_cannot_be_read(tmp_path, llama, change, says):
    (llama / 'config.json').write_text(json.dumps(LLAMA_OFFICIAL | change))
    message = refused(llama, tmp_path)
    assert [part for part in says if part not in message] == [], message


def test_damaged_weights(tmp_path, llama):
    first, second, third = sorted(llama.glob('*.safetensors'))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])  # cut off
    second.write_bytes(b'\xff' * 100)  # no header
    third.unlink()
    message = refused(llama, tmp_path, TensorFileError)
    assert all(path.name in message for path in (first, second, third))
    (llama / INDEX).write_text('{}')
    assert INDEX in refused(llama, tmp_path, TensorFileError)
    (llama / INDEX).write_text(
        '{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    assert 'outside' in refused(llama, tmp_path, TensorFileError)


def test_an_index_that_does_not_fit(tmp_path, llama):
    index = read_json(llama / INDEX)
    names = list(index['weight_map'])
    one, other = names[0], next(
        n for n in names
        if index['weight_map'][n] != index['weight_map'][names[0]])
    index['weight_map'][one] = index['weight_map'][other]
    (llama / INDEX).write_text(json.dumps(index))
    assert one in refused(llama, tmp_path, TensorFileError)


def test_weights_that_are_missing_surplus_or_no_numbers(tmp_path, llama):
    path = min(llama.glob('*.safetensors'))
    (llama / INDEX).unlink()
    state = {}
    for shard in llama.glob('model-*.safetensors'):
        state |= load_file(shard)
    path = llama / SINGLE
    a, b = 'model.norm.weight', 'model.layers.1.self_attn.k_proj.weight'
    save_file({n: t for n, t in state.items() if n not in (a, b)}
              | {'score.weight': torch.ones(2, 96)}, path)
    message = refused(llama, tmp_path, ConversionError)
    for part in (f'missing: {a}', f'missing: {b}', 'surplus: score.weight'):
        assert part in message
    save_file(state | {'lm_head.weight': torch.ones(1000, 96)}, path)
    assert 'differs from the embedding' in refused(llama, tmp_path)
    save_file(state | {b: state[b] * float('nan')}, path)
    assert f'{b} are NaN' in refused(llama, tmp_path, ConversionError)
    save_file(state | {b: state[b].to(torch.int8)}, path)
    assert 'quantized' in refused(llama, tmp_path, TensorFileError)


def test_pickled_weights_are_refused(tmp_path, llama):
    for path in [*llama.glob('*.safetensors'), llama / INDEX]:
        path.unlink()
    torch.save({'a': torch.ones(1)}, llama / 'pytorch_model.bin')
    message = refused(llama, tmp_path, TensorFileError)
    assert 'pytorch_model.bin is pickled' in message


def test_a_tokenizer_that_does_not_fit(tmp_path, trained):
    folder = shutil.copytree(trained['llama2'] / 'hf', tmp_path / 'hf')
    made = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    made.add_tokens([f'<more {i}>' for i in range(200)])
    made.save(str(folder / 'tokenizer.json'))
    message = refused(folder, tmp_path, SourceError)
    assert '384 rows' in message and 'another model' in message
    with pytest.raises(SourceError, match='384 rows'):
        open_model(folder)
    (folder / 'tokenizer.json').write_text('{}')
    assert 'tokenizer.json cannot be read' in refused(folder, tmp_path)
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(SourceError, match='has no tokenizer.json'):
        open_model(folder)


def changed_record(run, tmp_path, change):
    """A copy of the run, with `change` made to its run.json."""
    run = shutil.copytree(run, tmp_path / run.name, symlinks=True)
    record = read_json(run / 'run.json')
    change(record)
    (run / 'run.json').write_text(json.dumps(record))
    return run


def test_a_dataset_with_another_tokenizer_since(trained, tmp_path, data):
    """The ids of the run would be other text."""
    run = changed_record(trained['gpt2'], tmp_path, lambda record: record[
        'dataset'].update(folder=str(data / 'coarse')))
    with pytest.raises(SourceError, match='another tokenizer') as caught:
        open_model(run)
    for name in 'small', 'coarse':
        sha256 = read_json(data / name / 'meta.json')['tokenizer']['sha256']
        assert f'{name}, ' in str(caught.value)
        assert sha256 in str(caught.value)
    with pytest.raises(SourceError, match='another tokenizer'):
        export_model(run, tmp_path / 'hf')


def test_a_plan_of_a_published_model(trained, data):
    from plan import planned_setting
    folder = trained['qwen3']
    config, run, setting = planned_setting(
        [f'--init_from=hf:{folder / "hf"}', f'--dataset={data / "small"}'], 1)
    assert config == find_source(folder).config
    assert run['options']['arch_preset'] == 'qwen3'


# --- what is written ---------------------------------------------------------


def test_what_no_class_expresses_is_refused(warm, data, tmp_path):
    """Before the training, where it was asked for."""
    result = warm.run('train.py', cwd=tmp_path, out_dir='out', **SYSTEM,
                      dataset=data / 'small', n_layer=1, n_embd=16, n_head=2,
                      block_size=16, max_iters=1, qk_norm=True,
                      norm_position='post', export_hf_at_end=True)
    assert result.returncode == 2, result.stderr
    for part in ('no Hugging Face class', 'qk_norm=True',
                 "norm_position='post'"):
        assert part in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(trained, tmp_path):
    out = export_model(trained['gpt2'], tmp_path / 'hf')
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match='--overwrite'):
        export_model(trained['qwen3'], out)
    assert snapshot(tmp_path) == before
    export_model(trained['qwen3'], out, overwrite=True)
    assert read_json(out / 'config.json')['model_type'] == 'qwen3'
    assert [path.name for path in tmp_path.iterdir()] == ['hf']
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter').write_text('')
    with pytest.raises(OutputError, match='no folder of a model'):
        export_model(trained['gpt2'], tmp_path / 'mine', overwrite=True)
    with pytest.raises(ConversionError, match='already'):
        export_model(out, tmp_path / 'again')


def test_values_beyond_float16_are_refused(trained, tmp_path):
    folder = shutil.copytree(trained['gpt2'] / 'hf', tmp_path / 'hf')
    state = load_file(folder / SINGLE)
    state['transformer.wte.weight'][5, 7] = 1e5
    save_file(state, folder / SINGLE, {'format': 'pt'})
    import_model(folder, tmp_path / 'back')
    with pytest.raises(TensorFileError, match='wte.weight.*float16'):
        export_model(tmp_path / 'back', tmp_path / 'half', dtype='float16')
    assert {p.name for p in tmp_path.iterdir()} == {'hf', 'back'}


def test_two_writers_of_one_folder(tmp_path, monkeypatch):
    """The second is refused up to the moment when the folder is there."""
    rename, tried = os.rename, []

    def second_writer():
        with pytest.raises(OutputError, match='another process'):
            with whole_folder(tmp_path / 'out'):
                pass

    def second_writer_before(*paths):
        tried.append(second_writer())
        rename(*paths)

    with whole_folder(tmp_path / 'out') as part:
        second_writer()
        (part / 'config.json').write_text('{}')
        monkeypatch.setattr(os, 'rename', second_writer_before)
    assert len(tried) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['config.json']


KILL = '''
import os, signal, sys
sys.path.insert(0, {root!r})
import hf_convert, training.whole_folder as whole
real, left = os.fsync, [{after}]
def fsync(fd):
    real(fd)
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
hf_convert.main(['export', {run!r}, {out!r}, '--max_shard_size=30KB'])
'''


def test_a_killed_export_leaves_nothing_that_looks_whole(trained, tmp_path):
    """Killed after each file that became durable, in a forked child; what is
    left is no model to anyone, and the next export clears it away."""
    out, ended = tmp_path / 'hf', None
    moments = 0
    while ended != 0:
        code = KILL.format(root=str(ROOT), run=str(trained['qwen3']),
                           out=str(out), after=moments)
        ended = run_forked(lambda code=code: exec(code, {}))
        assert ended in (0, -signal.SIGKILL)
        if ended and not out.exists():
            for left in tmp_path.iterdir():
                assert left.name == '.hf.part'
                if (left / 'config.json').exists():  # the last: it is whole
                    assert (left / 'README.md').exists()
        elif ended:  # killed after the renaming: it is whole
            transformers.AutoModelForCausalLM.from_pretrained(out)
            shutil.rmtree(out)
        moments += 1
    assert moments > 8
    assert [p.name for p in tmp_path.iterdir()] == ['hf']


# --- training from a model ---------------------------------------------------


@pytest.fixture
def go_on(warm, data, tmp_path):
    def go_on(init_from, **options):
        return warm.run(
            'train.py', cwd=tmp_path, out_dir=tmp_path / 'out',
            init_from=init_from, **SYSTEM | {
                'dataset': data / 'small', 'max_iters': 1, 'batch_size': 2,
                'eval_bytes': 2000, 'learning_rate': 1e-6} | options)
    return go_on


@pytest.mark.parametrize('preset', ['gpt2', 'llama3', 'qwen3'])
def test_training_goes_on_from_a_model(trained, tmp_path, go_on, preset):
    """Its first evaluation is the last of the run that was exported."""
    run = trained[preset]
    import_model(run / 'hf', tmp_path / 'imported')
    last = [r['val_loss'] for r in read_lines(run) if r['kind'] == 'eval'][-1]
    for init_from in f'hf:{run / "hf"}', tmp_path / 'imported':
        result = go_on(init_from)
        assert result.returncode == 0, result.stderr
        folder = newest(tmp_path / 'out')
        first = read_lines(folder)[1]
        assert first['kind'] == 'eval'
        assert abs(first['val_loss'] - last) < 1e-6
        record = read_json(folder / 'run.json')
        expected = read_json(run / 'run.json')['architecture']
        assert record['architecture'] | {'attention_backend': None} == (
            expected | {'attention_backend': None})


def test_resuming_a_run_that_began_from_a_model(trained, go_on):
    assert go_on(f'hf:{trained["qwen3"] / "hf"}').returncode == 0
    result = go_on('resume', max_iters=2)
    assert result.returncode == 0, result.stderr
    assert 'resumed at step 1' in result.stdout


def test_options_that_contradict_the_model(trained, go_on):
    result = go_on(f'hf:{trained["qwen3"] / "hf"}', n_layer=3, dropout=0.1,
                   arch_preset='gpt2', block_size=16, weight_tying=False)
    assert result.returncode == 2
    for part in ('n_layer=3', 'arch_preset', 'weight_tying=False'):
        assert part in result.stderr
    assert 'dropout' not in result.stderr + result.stdout
    assert 'block_size' not in result.stderr
    assert go_on(f'hf:{trained["qwen3"] / "hf"}', block_size=16,
                 dropout=0.1).returncode == 0


@pytest.mark.parametrize('dataset, says', [
    ('coarse', 'another tokenizer'), ('words', 'another tokenizer')])
def test_data_of_another_tokenizer(trained, data, go_on, dataset, says):
    result = go_on(f'hf:{trained["llama2"] / "hf"}', dataset=data / dataset)
    assert result.returncode == 2 and says in result.stderr, result.stderr


def test_an_export_that_fails_after_training(trained, go_on, tmp_path):
    """The run is finished all the same; what hf/ holds is not replaced."""
    assert go_on(f'hf:{trained["qwen3"] / "hf"}').returncode == 0
    run = newest(tmp_path / 'out')
    with whole_folder(run / 'hf'):  # as if another process exported it
        result = go_on('resume', export_hf_at_end=True)
    assert result.returncode == 1
    for part in ('training has finished', 'another process',
                 f'python hf_convert.py export {run} {run / "hf"}'):
        assert part in result.stderr
    assert 'Traceback' not in result.stderr
    end = read_lines(run)[-1]
    assert (end['kind'], end['status']) == ('end', 'finished')
    before = snapshot(run)
    result = go_on('resume', export_hf_at_end=True)
    assert result.returncode == 2 and '--export_hf_at_end=False' in (
        result.stderr)
    assert snapshot(run) == before


# --- the command -------------------------------------------------------------


def test_as_a_command(trained, warm, tmp_path):
    def convert(*arguments):
        return warm.run('hf_convert.py', *arguments, cwd=tmp_path)

    result = convert('export', trained['gpt2'], 'hf', '--dtype=bfloat16')
    assert (result.returncode, result.stdout) == (0, 'written: hf\n'), (
        result.stderr)
    result = convert('import', 'hf', 'hf')
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert re.match('error: .*hf exists', result.stderr)


# --- memory ------------------------------------------------------------------

PEAK = '''
import sys, resource
sys.path.insert(0, {root!r})
import hf_convert
hf_convert.main(['import', {folder!r}, {out!r}])
# of this program alone: ru_maxrss has what its parent had at the fork
with open('/proc/self/status') as status:
    print([line.split()[1] for line in status if line.startswith('VmHWM')][0])
'''


def write_zeros(folder, config, shapes, shards):
    """An official folder in bf16 whose shards are holes of the disk."""
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config))
    where = {}
    for i in range(shards):
        file = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
        header, end = {}, 0
        for name in sorted(shapes)[i::shards]:
            begin, end = end, end + 2 * shapes[name].numel()
            header[name] = {'dtype': 'BF16', 'shape': list(shapes[name]),
                            'data_offsets': [begin, end]}
            where[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, 'wb') as f:
            f.write(len(text).to_bytes(8, 'little') + text)
            f.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({'weight_map': where}))


@pytest.mark.slow
def test_import_of_qwen3_06b_in_little_memory(tmp_path):
    """596,049,920 parameters in bf16, tied, in shards: the peak of resident
    memory is below 1.3 times the file's size and 1 GB."""
    config = QWEN3_OFFICIAL | {
        'hidden_size': 1024, 'intermediate_size': 3072, 'head_dim': 128,
        'num_attention_heads': 16, 'num_hidden_layers': 28,
        'num_key_value_heads': 8, 'max_position_embeddings': 40960,
        'vocab_size': 151936}
    with torch.device('meta'):
        hf = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config.from_dict(config))
    shapes = {n: p.shape for n, p in hf.named_parameters()}
    total = sum(shape.numel() for shape in shapes.values())
    assert total == 596_049_920
    write_zeros(tmp_path / 'hf', config, shapes, shards=4)
    result = subprocess.run(
        [sys.executable, '-c', PEAK.format(
            root=str(ROOT), folder=str(tmp_path / 'hf'),
            out=str(tmp_path / 'out'))], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split()[-1]) * 1024
    print(f'peak {peak / 1e9:.2f} GB of {2 * total / 1e9:.2f} GB in bf16')
    assert peak < 1.3 * 2 * total + 1e9
    assert find_source(tmp_path / 'out').config.n_layer == 28
