"""Generate text from a trained run.

    python sample.py --out_dir=out-quickstart --prompt="def main():"
"""

import sys
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.checkpoint import find_checkpoint, load_weights, read_state
from training.configurator import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    Share,
    configure,
    exit_with,
)
from training.dataset import open_dataset
from training.device import DTYPES, autocast, resolve_device
from training.run_log import read_record, resolve_run

# what to sample from
out_dir: str = 'out'  # an out_dir (its newest run), a run or a checkpoint

# the text
prompt: str = ''  # what to continue; empty: the start of a document
num_samples: Positive = 3
max_new_tokens: Positive = 400
stop_at_eot: bool = True  # end a sample at an end-of-text token
temperature: NonNegativeFloat = 0.8  # 0: always the likeliest token
top_k: Positive | None = 200  # draw among the k likeliest tokens
top_p: Share | None = None  # draw among the fewest with this probability
seed: NonNegative = 1337

# system
device: str = 'auto'
dtype: Literal[tuple(DTYPES)] = 'float32'


def main():
    try:
        configure(globals(), __file__, sys.argv[1:])
        target = resolve_device(device)
        model, tokenizer, eot_id = load(out_dir, target)
    except ValueError as error:
        exit_with(error)

    # a document begins after an end-of-text id, as in training
    ids = [eot_id] + tokenizer.encode(prompt).ids
    idx = torch.tensor([ids], device=target)
    for number in range(num_samples):
        generator = torch.Generator(target).manual_seed(seed + number)
        with autocast(target, dtype):
            out = model.generate(
                idx, max_new_tokens, temperature, top_k, top_p,
                n_ids=tokenizer.get_vocab_size(),
                eos_id=eot_id if stop_at_eot else None, generator=generator)
        print(f'--- sample {number + 1} of {num_samples}')
        print(tokenizer.decode(out[0, 1:].tolist()), flush=True)


def load(path, target):
    """(model in evaluation mode, tokenizer, end-of-text id) of a run."""
    checkpoint = find_checkpoint(
        path if (Path(path) / 'state.json').exists() else resolve_run(path))
    config = ModelArchitectureConfig.from_dict(
        read_state(checkpoint)['architecture'])
    model = ConfigurableGPT(config).to(target).eval()
    load_weights(checkpoint, model)
    record = read_record(checkpoint.parent.parent)
    dataset = open_dataset(record['dataset']['folder'])
    if dataset.tokenizer_folder is None:
        raise ValueError(f'the dataset {dataset.folder} has no tokenizer, so '
                         'that its ids cannot be read as text')
    tokenizer = Tokenizer.from_file(
        str(dataset.tokenizer_folder / 'tokenizer.json'))
    return model, tokenizer, dataset.eot_id


if __name__ == '__main__':
    main()
