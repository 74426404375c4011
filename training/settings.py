"""What the options of a run come to: architecture, device, batch, schedule."""

import dataclasses

from model_components import attention_in_use
from model_config import (
    ArchitectureError,
    ModelArchitectureConfig,
    get_preset_config,
    options_without_effect,
)
from training.configurator import ConfigError
from training.dataset import Dataset
from training.device import (
    DTYPES,
    check_compiler,
    computing_dtype,
    device_name,
    resolve_device,
)
from training.distributed import Ranks
from training.flops import peak_tflops_of
from training.hf_config import config_to_hf

ARCHITECTURE_OPTIONS = tuple(
    field.name for field in dataclasses.fields(ModelArchitectureConfig))

EVAL_BYTES = 1_000_000
CPU_EVAL_BYTES = 20_000  # more takes a large model longer than its training


class Problems(list):
    """What is wrong, from every check that was made."""

    def attempt(self, function, *arguments):
        """Its result; None where it raises ValueError, which is noted."""
        try:
            return function(*arguments)
        except ValueError as error:
            self.extend(getattr(error, 'problems', [str(error)]))
        return None


def resolve(options: dict, dataset: Dataset, ranks: Ranks) -> dict:
    """What the options come to, or one ConfigError with all that is wrong."""
    problems = Problems()
    plan = problems.attempt(derive, options, dataset, ranks)
    device = problems.attempt(resolve_device, options['device'],
                              ranks.local_rank)
    if device is not None and options['compile']:
        problems.attempt(check_compiler, device)
    if ranks.world_size > 1 and options['device'].startswith('cuda:'):
        problems.append(f'device={options["device"]}: each of several '
                        'processes takes a GPU of its own; give cuda')
    if problems:
        raise ConfigError(problems)
    config = plan['config']
    plan['device'] = device
    plan['dtype'] = computing_dtype(device, options['dtype'])
    plan['recomputation'] = recomputation(options)
    plan['attention'] = attention_in_use(
        config.attention_backend, device.type, DTYPES[plan['dtype'][0]])
    plan['device_name'] = device_name(device)
    plan['peak_tflops'] = options['peak_tflops'] or peak_tflops_of(
        plan['device_name'], plan['dtype'][0])
    plan['eval_bytes'] = options['eval_bytes'] or (
        CPU_EVAL_BYTES if device.type == 'cpu' else EVAL_BYTES)
    return plan


def derive(options: dict, dataset, ranks: Ranks) -> dict:
    """What the options come to on any device: config, accumulation,
    tokens_per_iter, max_iters, schedule. ConfigError with all problems.

    `dataset` is a Dataset, or an AbsentDataset for a plan.
    """
    problems = Problems(contradictions(options))
    config = problems.attempt(build_architecture, options, dataset)
    plan = {'config': config}
    if config is not None:
        if options['export_hf_at_end']:
            problems.attempt(config_to_hf, config)
        train = dataset.splits.get('train')
        if train and train.tokens < config.block_size + 1:
            problems.append(
                f'the training split of {dataset.name} has {train.tokens} '
                f'tokens, a sequence needs block_size + 1 = '
                f'{config.block_size + 1}: set a smaller --block_size')
        plan |= problems.attempt(resolve_batch, options, config, ranks) or {}
    plan['schedule'] = problems.attempt(
        resolve_schedule, options, plan.get('max_iters', options['max_iters']))
    if problems:
        raise ConfigError(problems)
    return plan


def contradictions(options: dict) -> list[str]:
    """Problems with options that exclude each other."""
    problems = []
    if options['use_zero1'] and options['use_fsdp']:
        problems.append('use_zero1 and use_fsdp exclude each other: FSDP '
                        'shards the optimizer state too; set one to False')
    budget = options['activation_memory_budget']
    if options['activation_checkpointing'] == 'full' and budget < 1:
        problems.append(
            f'activation_memory_budget={budget} has no effect with '
            "activation_checkpointing='full', which keeps no activations: "
            'leave one of them out, or set the budget to 1')
    return problems


def recomputation(options: dict) -> tuple[str, str]:
    """(activation_checkpointing, reason) that really runs for a request."""
    if options['activation_memory_budget'] < 1 and not options['compile']:
        return 'full', 'activation_memory_budget needs compile=True'
    return options['activation_checkpointing'], 'as configured'


def build_architecture(options: dict, dataset: Dataset):
    """The configuration that preset, options and dataset ask for."""
    preset = options['arch_preset']
    given = {name: options[name] for name in ARCHITECTURE_OPTIONS
             if options[name] is not None}
    problems = []
    try:
        config = get_preset_config(
            preset, **{'vocab_size': dataset.vocab_size} | given)
    except ArchitectureError as error:
        # whether positions are used can be told all the same
        problems = error.problems
        config = get_preset_config(preset, **{
            name: given[name] for name in given
            if name in ('position_encoding', 'rope_theta')})
    problems = problems + options_without_effect(config, set(given))
    n_ids = largest_id(dataset) + 1
    rows = given.get('vocab_size', dataset.vocab_size)
    if rows < n_ids:
        problems.append(
            f'vocab_size={rows} has no row for id {n_ids - 1} '
            f'of {dataset.name}: leave vocab_size out '
            f'({dataset.vocab_size} then) or set at least {n_ids}')
    if problems:
        raise ArchitectureError(problems)
    return config


@dataclasses.dataclass(frozen=True)
class AbsentDataset:
    """What build_architecture asks a dataset for, where there is none yet."""

    name: str
    vocab_size: int
    splits: dict = dataclasses.field(default_factory=dict)

    @property
    def tokenizer_size(self):
        return self.vocab_size


def vocabulary_without_dataset(options: dict) -> AbsentDataset:
    """The vocabulary that the options set, for a plan made before the data."""
    if options['vocab_size'] is None:
        raise ConfigError([
            f'dataset {options["dataset"]} is not there to tell the '
            'vocabulary: prepare it, or give --vocab_size=N'])
    return AbsentDataset(options['dataset'], options['vocab_size'])


def largest_id(dataset: Dataset) -> int:
    """The largest id of the bins, or that of the tokenizer if not recorded."""
    largest = [file['max_id'] for split in dataset.splits.values()
               for file in split.files]
    if not largest or None in largest:
        return dataset.tokenizer_size - 1
    return max(largest)


def resolve_batch(options: dict, config, ranks: Ranks) -> dict:
    """The same options mean the same batch on any number of processes."""
    total = options['gradient_accumulation_steps']
    accumulation, rest = divmod(total, ranks.world_size)
    if rest:
        raise ValueError(
            f'gradient_accumulation_steps={total} counts the micro-steps of '
            f'all processes and is not divisible by the {ranks.world_size} '
            'there are: set a multiple')
    tokens_per_iter = options['batch_size'] * total * config.block_size
    max_iters = options['max_iters']
    if options['max_tokens'] is not None:
        max_iters = -(-options['max_tokens'] // tokens_per_iter)
    return {'accumulation': accumulation, 'tokens_per_iter': tokens_per_iter,
            'max_iters': max_iters}


def resolve_schedule(options: dict, max_iters: int) -> dict:
    """Arguments of learning_rate_at: unset ones are derived, all checked."""

    def default(name, value):
        return value if options[name] is None else options[name]

    lr = options['learning_rate']
    decay_iters = default('lr_decay_iters', max_iters)
    schedule = {
        'schedule': options['lr_schedule'], 'learning_rate': lr,
        'min_lr': default('min_lr', lr / 10),
        'warmup_iters': default('warmup_iters', round(0.02 * max_iters)),
        'lr_decay_iters': decay_iters,
        'wsd_decay_iters': default('wsd_decay_iters', decay_iters // 5),
    }
    problems = []
    if schedule['min_lr'] > lr:
        problems.append(f'min_lr={schedule["min_lr"]} is above '
                        f'learning_rate={lr}')
    if options['lr_decay_iters'] is not None and (
            schedule['warmup_iters'] > decay_iters):
        problems.append(f'warmup_iters={schedule["warmup_iters"]} is above '
                        f'lr_decay_iters={decay_iters}')
    if options['wsd_decay_iters'] is not None and (
            options['lr_schedule'] != 'wsd'):
        problems.append(
            f'wsd_decay_iters={options["wsd_decay_iters"]} has no effect with '
            f"lr_schedule={options['lr_schedule']!r}: leave it out, or set "
            "lr_schedule='wsd'")
    if problems:
        raise ConfigError(problems)
    return schedule
