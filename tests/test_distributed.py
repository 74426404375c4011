"""Every strategy, at every number of ranks, is one and the same training.

fp32 on the CPU. One process on the same global batch is the reference; the
sums of gradients are rounded in another order, so nothing is equal to the
bit but what is only copied.
"""

import copy
import json
import math

import pytest
import torch
from planted import read_batches
from running import (
    SYSTEM,
    TINY,
    assert_same_course,
    course,
    newest,
    read_json,
    read_lines,
    whole_tensors,
)
from safetensors.torch import load_file

from hf_convert import import_model
from model_builder import ConfigurableGPT
from model_config import get_preset_config
from training.distributed import Ranks
from training.strategies import Replicated, Zero1, sum_of_squares

LOSS_TOLERANCE = 1e-6  # relative
NORM_TOLERANCE = 1e-6  # relative

STRATEGIES = {'DDP': {}, 'ZeRO-1': {'use_zero1': True},
              'FSDP': {'use_fsdp': True}}
MANY = [(name, ranks) for ranks in (2, 4) for name in STRATEGIES]
ALL = [('DDP', 1), *MANY]  # of one process, 'DDP' is nothing
UPDATES = 5
COMMON = TINY | {
    'batch_size': 1, 'gradient_accumulation_steps': 8, 'max_iters': UPDATES,
    'eval_interval': 100, 'n_layer': 2, 'learning_rate': 1e-3,
    'warmup_iters': 2, 'deterministic': True}
# no size is divisible by the ranks: of 6 rows, the last of 4 ranks has none
MODELS = {
    'tied': {'n_embd': 10, 'n_head': 2, 'd_ff': 33, 'vocab_size': 331},
    'untied': {
        'arch_preset': 'qwen3', 'n_embd': 18, 'n_head': 3, 'head_dim': 6,
        'num_key_value_heads': 3, 'd_ff': 31, 'vocab_size': 337},
}


def label(name, ranks):
    return f'{name} {ranks}' if ranks > 1 else 'single'


@pytest.fixture(scope='module')
def trained(warm_ranks, data, tmp_path_factory):
    """trained(model, strategy, ranks): the out_dir of that run, made once.

    Beside its runs lie the batches of the ranks and the first gradients.
    """
    folder = tmp_path_factory.mktemp('trained')
    made = {}

    def get(model, strategy, ranks, before='', **options):
        key = f'{model} {label(strategy, ranks)} {options}'
        if key not in made:
            out_dir = folder / str(len(made))
            out_dir.mkdir()
            result = warm_ranks.run(
                ranks, 'train.py', out_dir=out_dir, before=(
                    'import planted\n'
                    f'planted.witness_batches(rank, {str(out_dir / "b")!r})\n'
                    'planted.witness_gradients(rank, '
                    f'{str(out_dir / "g.safetensors")!r})\n' + before),
                **COMMON | {'dataset': data / 'small'} | MODELS[model]
                | (STRATEGIES[strategy] if ranks > 1 else {}) | options)
            assert result.statuses == [0] * ranks, result.err
            made[key] = out_dir
        return made[key]

    return get


def assert_close_courses(found, expected, loss=LOSS_TOLERANCE,
                         norm=NORM_TOLERANCE):
    """The same steps, each number within its relative tolerance."""
    assert found.keys() == expected.keys()
    for at, numbers in expected.items():
        for name, value in numbers.items():
            tolerance = norm if name == 'grad_norm' else (
                loss if 'loss' in name or name == 'val_bpb' else 0)
            assert math.isclose(found[at][name], value, abs_tol=0,
                                rel_tol=tolerance), (at, name)


def largest_difference(found, expected, name):
    return max(abs(found[at][name] / expected[at][name] - 1)
               for at in expected if at[0] == 'train')


# --- losses and gradients ----------------------------------------------------


@pytest.mark.parametrize('strategy, ranks', MANY)
@pytest.mark.parametrize('model', MODELS)
def test_losses_and_norms_are_those_of_one_process(trained, model, strategy,
                                                   ranks, parity_report):
    one = trained(model, 'DDP', 1)
    many = trained(model, strategy, ranks)
    expected, found = course(newest(one)), course(newest(many))
    assert sum(kind == 'train' for kind, _ in expected) == UPDATES
    parity_report(
        f'{model + ", " + label(strategy, ranks):32} loss '
        f'{largest_difference(found, expected, "loss"):.1e}  norm '
        f'{largest_difference(found, expected, "grad_norm"):.1e}')
    assert_close_courses(found, expected)
    assert read_batches(many / 'b', ranks) == read_batches(one / 'b', 1)


@pytest.mark.parametrize('strategy, ranks', MANY)
@pytest.mark.parametrize('model', MODELS)
def test_the_gradients_are_those_of_one_process(trained, model, strategy,
                                                ranks):
    expected = load_file(trained(model, 'DDP', 1) / 'g.safetensors')
    found = load_file(trained(model, strategy, ranks) / 'g.safetensors')
    assert found.keys() == expected.keys() and len(found) > 15
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        assert scale > 1e-6, name  # not equal by smallness
        difference = (found[name] - grad).abs().max().item()
        assert difference <= 2e-6 * scale, name


@pytest.mark.parametrize('strategy, ranks', ALL)
@pytest.mark.parametrize('model', MODELS)
def test_the_norm_is_that_of_fp64(trained, model, strategy, ranks):
    out_dir = trained(model, strategy, ranks)
    assert math.isclose(course(newest(out_dir))['train', 1]['grad_norm'],
                        exact_norm(out_dir), rel_tol=NORM_TOLERANCE)
    assert math.isclose(exact_norm(out_dir), rel_tol=NORM_TOLERANCE,
                        b=exact_norm(trained(model, 'DDP', 1)))


def exact_norm(out_dir):
    grads = load_file(out_dir / 'g.safetensors').values()
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


def test_the_norm_of_a_large_gradient():
    """torch's own norm of so many elements is off by 2e-5 on a CPU."""
    grad = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1))
    exact = grad.double().square().sum().item()
    assert math.isclose(sum_of_squares(grad).item(), exact, rel_tol=1e-6)


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_activation_checkpointing(trained, strategy):
    expected = course(newest(trained('untied', 'DDP', 1)))
    found = course(newest(trained(
        'untied', strategy, 2, activation_checkpointing='full',
        fsdp_reshard_after_forward=strategy == 'FSDP')))
    assert_close_courses(found, expected)


COMPILED = {'before': 'planted.quick_compiler()\n', 'compile': True,
            'activation_checkpointing': 'full'}


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_compile_over_activation_checkpointing(trained, strategy):
    one = newest(trained('untied', 'DDP', 1))
    found = newest(trained('untied', strategy, 2, **COMPILED))
    assert_close_courses(course(found), course(one), loss=2 * LOSS_TOLERANCE)
    # no name has a prefix of the compiler or of DDP
    assert whole_tensors(found / 'checkpoints/latest').keys() == (
        whole_tensors(one / 'checkpoints/latest').keys())


@pytest.mark.parametrize('strategy', ['ZeRO-1', 'FSDP'])
def test_a_compiled_run_is_resumed_to_the_bit(trained, warm_ranks, data,
                                              tmp_path, strategy):
    expected = newest(trained('untied', strategy, 2, **COMPILED))
    compiled = {k: v for k, v in COMPILED.items() if k != 'before'}
    before = 'import planted\n' + COMPILED['before']
    for how, stop, status in (
            (COMMON | MODELS['untied'] | STRATEGIES[strategy] | compiled
             | {'dataset': data / 'small'},
             'planted.signal_at_update(rank, {0: (2, "SIGTERM")})', 143),
            ({'init_from': 'resume'}, '', 0)):
        result = warm_ranks.run(2, 'train.py', out_dir=tmp_path,
                                before=before + stop, **how)
        assert result.statuses == [status] * 2, result.err
    assert_same_course(course(newest(tmp_path)), course(expected))
    found = whole_tensors(newest(tmp_path) / 'checkpoints/latest')
    for key, tensor in whole_tensors(expected / 'checkpoints/latest').items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize('change', [
    lambda c: c['train', 3].update(loss=c['train', 3]['loss'] * (1 + 1e-3)),
    lambda c: c['train', 1].update(loss=c['train', 1]['loss'] * (1 - 2e-6)),
    lambda c: c['train', 5].update(
        grad_norm=c['train', 5]['grad_norm'] * (1 + 1e-3)),
    lambda c: c['train', 2].update(lr=c['train', 2]['lr'] * (1 + 1e-9)),
    lambda c: c.pop(('train', 4)),
], ids=['loss', 'loss a little', 'norm', 'lr', 'step missing'])
def test_the_comparison_can_fail(trained, change):
    expected = course(newest(trained('tied', 'DDP', 1)))
    found = copy.deepcopy(expected)
    assert_close_courses(found, expected)
    change(found)
    with pytest.raises(AssertionError):
        assert_close_courses(found, expected)


def test_another_batch_is_caught(trained):
    """The witnesses of the batches see one window more or less."""
    one = read_batches(trained('tied', 'DDP', 1) / 'b', 1)
    other = read_batches(trained('tied', 'DDP', 1, seed=7) / 'b', 1)
    assert len(one) == len(other) == len(set(one)) == 8 * UPDATES
    assert one != other


# --- checkpoints -------------------------------------------------------------


@pytest.fixture(scope='module')
def sources(trained):
    """{label: checkpoint} of the model 'untied' after the same updates."""
    return {label(*source): newest(trained('untied', *source))
            / 'checkpoints' / 'latest' for source in ALL}


@pytest.fixture(scope='module')
def resharded(warm_ranks, sources, tmp_path_factory):
    """resharded(strategy, ranks): the folder that reshard.py left, made
    once."""
    folder = tmp_path_factory.mktemp('resharded')
    config = read_json(next(iter(sources.values())) / 'state.json')
    made = {}

    def get(strategy, ranks):
        key = label(strategy, ranks)
        if key not in made:
            out, spec = folder / key, folder / f'{key}.json'
            spec.write_text(json.dumps({
                'sources': {name: str(path) for name, path in sources.items()},
                'strategy': STRATEGIES[strategy] if ranks > 1 else {},
                'config': config['architecture'], 'out': str(out)}))
            result = warm_ranks.run(ranks, 'tests/reshard.py', spec)
            made[key] = out, result
        out, result = made[key]
        assert result.statuses == [0] * ranks, result.err
        return out

    return get


@pytest.mark.parametrize('strategy, ranks', ALL)
def test_any_checkpoint_is_loaded_to_the_bit(resharded, sources, strategy,
                                             ranks):
    """Saved under each of seven, loaded and saved again under another."""
    out = resharded(strategy, ranks)
    for name, source in sources.items():
        again = next((out / name / 'checkpoints').glob('step_*'))
        expected, found = whole_tensors(source), whole_tensors(again)
        assert len(expected) == 3 * 19  # weights and two moments
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)
        was, is_now = (read_json(path / 'state.json')
                       for path in (source, again))
        for key in 'step', 'optimizer_steps', 'architecture':
            assert was[key] == is_now[key]
        assert was['optimizer_steps'] == UPDATES


@pytest.mark.parametrize('strategy, ranks', MANY)
def test_any_checkpoint_trains_on(resharded, sources, strategy, ranks):
    """The next losses are those of one process with the same checkpoint."""
    one, many = resharded('DDP', 1), resharded(strategy, ranks)
    for name in sources:
        expected, found = (
            read_json(out / f'{name}.json')['losses'] for out in (one, many))
        assert abs(expected[1] / expected[0] - 1) > 1e-4  # something was learnt
        for a, b in zip(expected, found, strict=True):
            assert math.isclose(a, b, rel_tol=LOSS_TOLERANCE), name


@pytest.mark.parametrize('strategy, ranks', MANY)
def test_the_strategies_end_at_the_same_weights(sources, strategy, ranks):
    """So no range of a moment stands at the place of another."""
    expected = whole_tensors(sources['single'])
    found = whole_tensors(sources[label(strategy, ranks)])
    for key, tensor in expected.items():
        scale = tensor.abs().max().item()
        assert scale > 0, key
        difference = (found[key] - tensor).abs().max().item()
        # an element whose gradient is nothing but rounding may go either way
        # by one update of AdamW, 1e-3
        assert difference < 1e-2 * scale + 1e-4 * (key[0] == 'model'), key


@pytest.mark.parametrize('strategy, ranks', ALL)
def test_optimizer_bytes_are_what_is_reported(resharded, trained, strategy,
                                              ranks):
    outcome = read_json(resharded(strategy, ranks) / 'single.json')
    assert outcome['bytes'] == outcome['reported']
    total = read_json(resharded('DDP', 1) / 'single.json')['bytes'][0]
    if strategy == 'DDP':
        assert outcome['bytes'] == [total] * ranks
    else:
        assert sum(outcome['bytes']) == total
    if strategy == 'ZeRO-1':
        assert max(outcome['bytes']) <= 1.1 * total / ranks
    run = newest(trained('untied', strategy, ranks))
    assert read_json(run / 'run.json')['optimizer_bytes_per_rank'] == (
        outcome['bytes'])


@pytest.mark.parametrize('ranks', [2, 4, 8])
@pytest.mark.parametrize('tied', [True, False])
def test_no_rank_holds_more_than_its_share_of_qwen3(ranks, tied):
    """The real 0.6B, whose embedding alone is a quarter when tied."""
    config = get_preset_config('qwen3', vocab_size=151936, weight_tying=tied)
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    total = model.get_num_params()
    assert total == (596_049_920 if tied else 751_632_384)
    options = dict(learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95),
                   eps=1e-8)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    ranges = {name: [] for name in sizes}
    for rank in range(ranks):
        strategy = Zero1(model, Ranks(rank, rank, ranks), options)
        held = sum(p.numel() for group in strategy.optimizer.param_groups
                   for p in group['params'])
        assert held <= 1.1 * total / ranks
        assert strategy.optimizer_bytes == 8 * held
        for piece in strategy.pieces():
            ranges[piece.name].append(
                (piece.start, piece.start + len(piece.weight)))
    for name, size in sizes.items():  # each element once
        borders = sorted(ranges[name])
        assert [b for _, b in borders] == [a for a, _ in borders[1:]] + [size]
        assert borders[0][0] == 0
    with torch.device('meta'):
        whole = Replicated(model, Ranks(0, 0, ranks), options)
    assert whole.optimizer_bytes == 8 * total


# --- a model that rank 0 exports, and all begin from ------------------------


@pytest.mark.parametrize('strategy', ['DDP', 'FSDP'])
def test_the_export_at_the_end(trained, strategy):
    run = newest(trained('tied', strategy, 2, export_hf_at_end=True))
    exported = load_file(run / 'hf' / 'model.safetensors')
    saved = whole_tensors(run / 'checkpoints' / 'latest')
    assert torch.equal(exported['transformer.wte.weight'].flatten(),
                       saved['model', 'wte.weight'])
    assert read_lines(run)[-1]['status'] == 'finished'


def begin_from(path, warm_ranks, data, tmp_path, **options):
    return warm_ranks.run(2, 'train.py', out_dir=tmp_path / 'out', **SYSTEM | {
        'init_from': path, 'dataset': data / 'small', 'batch_size': 1,
        'gradient_accumulation_steps': 8, 'max_iters': 1,
        'eval_bytes': 2000} | options)


@pytest.mark.parametrize('use_fsdp', [False, True])
def test_beginning_from_a_model(warm_ranks, trained, data, tmp_path,
                                use_fsdp):
    """Of Hugging Face, and imported: where the exported run ended."""
    run = newest(trained('tied', 'DDP', 2, export_hf_at_end=True))
    import_model(run / 'hf', tmp_path / 'imported')
    last = course(run)['eval', UPDATES]['val_loss']
    for path in f'hf:{run / "hf"}', tmp_path / 'imported':
        result = begin_from(path, warm_ranks, data, tmp_path,
                            use_fsdp=use_fsdp)
        assert result.statuses == [0, 0], result.err
        found = course(newest(tmp_path / 'out'))['eval', 0]['val_loss']
        assert math.isclose(found, last, rel_tol=LOSS_TOLERANCE)


def test_a_model_that_cannot_be_begun_from(warm_ranks, trained, data,
                                           tmp_path):
    """Contradicting options are told once; where rank 1 does not see the
    model that rank 0 sees, both end."""
    run = newest(trained('tied', 'DDP', 2, export_hf_at_end=True))
    result = begin_from(f'hf:{run / "hf"}', warm_ranks, data, tmp_path,
                        n_layer=7)
    assert result.statuses == [2, 2] and result.err[1] == ''
    assert 'n_layer=7' in result.err[0]
    state = import_model(run / 'hf', tmp_path / 'imported') / 'state.json'
    result = begin_from(state.parent, warm_ranks, data, tmp_path, before=(
        f'import planted\nplanted.unseen(rank, {{1: {str(state)!r}}})'))
    assert result.statuses == [2, 2] and result.seconds < 60
    assert str(state) in result.err[1] and result.err[0] == ''
    assert not (tmp_path / 'out').exists()


# --- from one number of ranks and strategy to another ------------------------

CHAINS = {
    '1, 2, 4, 1 ranks': [('DDP', 1), ('ZeRO-1', 2), ('FSDP', 4), ('DDP', 1)],
    'DDP, ZeRO-1, FSDP, DDP': [('DDP', 2), ('ZeRO-1', 2), ('FSDP', 2),
                               ('DDP', 2)],
}


@pytest.mark.parametrize('chain', CHAINS.values(), ids=CHAINS)
def test_resumed_with_other_ranks_and_strategies(warm_ranks, data, trained,
                                                 tmp_path, chain):
    """Stopped by a signal in three legs; the same losses, the same tokens."""
    options = {'max_iters': 12, 'lr_decay_iters': 12, 'eval_interval': 4}
    one = trained('untied', 'DDP', 1, **options)
    batches, begin = [], 0
    for leg, (strategy, ranks) in enumerate(chain):
        last = leg == len(chain) - 1
        witness = tmp_path / f'leg_{leg}'
        before = ('import planted\n'
                  f'planted.witness_batches(rank, {str(witness)!r})\n')
        if not last:  # one rank alone is told to stop in its third update
            before += (f'planted.signal_at_update(rank, '
                       f'{{{ranks - 1}: (3, "SIGTERM")}})\n')
        how = {'use_zero1': False, 'use_fsdp': False} | (
            STRATEGIES[strategy] if ranks > 1 else {})
        first = COMMON | MODELS['untied'] | options | {
            'dataset': data / 'small', 'init_from': 'scratch'}
        result = warm_ranks.run(
            ranks, 'train.py', before=before, out_dir=tmp_path,
            **(first if leg == 0 else {'init_from': 'resume'}) | how)
        assert result.statuses == [0 if last else 128 + 15] * ranks, result.err
        end = read_lines(newest(tmp_path))[-1]
        assert end['step'] == (12 if last else begin + 3)
        # the loader reads ahead of the loop, the witness does not
        batches += read_batches(witness, ranks)[:8 * (end['step'] - begin)]
        begin = end['step']
    assert_close_courses(course(newest(tmp_path)), course(newest(one)))
    assert batches == read_batches(one / 'b', 1)
    assert len(batches) == 12 * 8
    starts = [r for r in read_lines(newest(tmp_path))
              if r['kind'] in ('start', 'resume')]
    assert [(r['kind'], r['world_size']) for r in starts] == [
        ('resume' if leg else 'start', ranks)
        for leg, (_, ranks) in enumerate(chain)]
    names = {'DDP': 'DDP', 'ZeRO-1': 'DDP with ZeRO-1', 'FSDP': 'FSDP2'}
    assert [r['strategy'] for r in starts] == [
        names[strategy] if ranks > 1 else 'single'
        for strategy, ranks in chain]
