"""What a run will need before it runs: memory, hours, disk. Needs no GPU.

Takes train.py's config files and options, and a GPU by name. The memory of a
step is counted from the model's own graph (training/memory.py); the hours
follow from the MFU that you expect, the disk from the tokens.

    python plan.py config/full_qwen3_1.5b.py --gpu a6000 --n_gpus 2
    python plan.py config/full_qwen3_1.5b.py config/hardware_dgx_b200.py \
        --gpu b200 --n_gpus 8 --mfu 0.45
"""

import argparse
import runpy
import sys
from pathlib import Path

from training.configurator import ConfigError, exit_with, parse, read_schema
from training.dataset import DatasetError, open_dataset
from training.distributed import Ranks
from training.flops import GPUS
from training.initial_model import adopt_architecture, find_published
from training.planning import print_plan, setting_of
from training.settings import derive, vocabulary_without_dataset

TRAIN = Path(__file__).resolve().parent / 'train.py'


def main():
    gpus = {gpu.key: gpu for gpu in GPUS}
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='*', help='config files, and options '
                        'of train.py as --name=value')
    parser.add_argument('--gpu', choices=gpus, default='a6000',
                        help='default: %(default)s')
    parser.add_argument('--n_gpus', type=int, default=1,
                        help='processes, one a GPU; default: %(default)s')
    parser.add_argument('--mfu', type=float, default=0.4,
                        help='expected share of the peak; default: '
                        '%(default)s')
    args, options = parser.parse_known_args()
    try:
        plan(args, gpus[args.gpu], args.config + options)
    except ValueError as error:
        exit_with(error)


def plan(args, gpu, argv):
    if args.n_gpus < 1:
        raise ConfigError([f'n_gpus={args.n_gpus} is less than 1'])
    if not 0 < args.mfu <= 1:
        raise ConfigError([f'mfu={args.mfu} is no share: 0.4 is 40 %'])
    config, run, setting = planned_setting(argv, args.n_gpus)
    print_plan(config, run['options'], run, gpu=gpu, mfu=args.mfu,
               setting=setting, train_tokens=run['train_tokens'])


def planned_setting(argv: list[str], n_gpus: int):
    """(architecture, what the run comes to, memory setting) of train.py's
    arguments, on GPUs that need not be there, for data that need not be."""
    schema = read_schema(runpy.run_path(str(TRAIN)), TRAIN)
    parsed = parse(schema, argv)
    options = parsed.values
    published = find_published(options['init_from'], Ranks())
    if published is not None:
        adopt_architecture(parsed, published)
    try:
        dataset = open_dataset(options['dataset'])
    except DatasetError:
        dataset = None
    run = derive(options, dataset or vocabulary_without_dataset(options),
                 Ranks(world_size=n_gpus))
    setting = setting_of(options, run['accumulation'], n_gpus, 'cuda',
                         options['dtype'])
    return run['config'], run | {
        'options': options,
        'train_tokens': dataset and dataset.split('train').tokens}, setting


if __name__ == '__main__':
    sys.exit(main())
