"""Hugging Face models and this project's, either way, weight by weight.

    python hf_convert.py import Qwen/Qwen3-0.6B out-qwen3-official
    python hf_convert.py export out-quickstart my-model
    python hf_convert.py check Qwen/Qwen3-0.6B README.md

`import` makes a checkpoint folder out of a model of the hub or of a folder:
train.py begins from it with --init_from=PATH, sample.py and eval.py read it.
`export` makes a folder that transformers, vLLM and llama.cpp's converter load.
Neither overwrites a folder unasked, and a folder with the final name is whole.
`check` compares logits and perplexity with transformers.
"""

import argparse
import re
from pathlib import Path

import torch
import transformers

from model_builder import ConfigurableGPT
from training.checkpoint import FORMAT_VERSION
from training.configurator import exit_with
from training.durable import write_bytes, write_json
from training.hf_config import (
    FAMILIES,
    TOKEN_IDS,
    ConversionError,
    config_from_hf,
    config_to_hf,
)
from training.hf_export import export_model
from training.hf_folder import eot_of, locate, open_hf_folder
from training.hf_weights import ImportedWeights, state_to_hf
from training.model_source import fill, open_model, read_tokenizer
from training.tensor_files import write_shards
from training.whole_folder import whole_folder


def from_hf(hf_model, **overrides) -> ConfigurableGPT:
    """A ConfigurableGPT with the weights of a GPT2LMHeadModel,
    LlamaForCausalLM or Qwen3ForCausalLM.

    `overrides` are fields of the architecture that do not change the weights,
    e.g. attention_backend. Weights keep their values and become fp32.
    Raises ValueError for a model or variant that this project cannot express.
    """
    config = config_from_hf(hf_model.config, **overrides)
    model = ConfigurableGPT(config)
    fill(model, ImportedWeights(hf_model.state_dict(), config))
    return model


def to_hf(model: ConfigurableGPT):
    """The transformers model with these weights, in fp32.

    Raises ValueError that names the fields no Hugging Face class can express.
    """
    hf_config = config_to_hf(model.config)
    hf_class = getattr(transformers, FAMILIES[hf_config.model_type].model)
    hf_model = hf_class(hf_config)
    state = state_to_hf(model.state_dict(), model.config)
    missing, unexpected = hf_model.load_state_dict(state, strict=False)
    if model.config.weight_tying:
        missing = [name for name in missing if name != 'lm_head.weight']
    if missing or unexpected:
        raise RuntimeError(f'weights that do not match: missing {missing}, '
                           f'unexpected {unexpected}')
    hf_model.tie_weights()
    return hf_model.eval()


def import_model(name_or_path, out, *, dtype='float32', max_shard_size='5GB',
                 overwrite=False) -> Path:
    """Write a Hugging Face model as a checkpoint folder; returns its path.

    Weights go through memory one at a time. The tokenizer lies in
    tokenizer/; there is no optimizer state. Raises ValueError.
    """
    folder = locate(name_or_path).absolute()
    config, weights, hf_config = open_hf_folder(folder)
    tokenizer = _tokenizer_of(folder, config, hf_config)
    with whole_folder(out, overwrite) as part:
        files = write_shards(part, weights.shapes, max_shard_size,
                             getattr(torch, dtype),
                             lambda name: _whole(weights, name))
        for name, content in (tokenizer.files if tokenizer else {}).items():
            write_bytes(part / 'tokenizer' / name, content)
        write_json(part / 'state.json', {
            'format_version': FORMAT_VERSION, 'step': 0, 'val_loss': None,
            'world_size': 1, 'optimizer_steps': 0,
            'architecture': config.to_dict(), 'files': files,
            'imported': {
                'from': str(name_or_path), 'weights': dtype,
                'tokenizer': tokenizer.record if tokenizer else None,
                'token_ids': {name: getattr(hf_config, name, None)
                              for name in TOKEN_IDS}}})
    return Path(out)


def _whole(weights, name) -> torch.Tensor:
    flat = torch.empty(torch.Size(weights.shapes[name]).numel())
    weights.read(name, 0, flat)
    return flat.view(weights.shapes[name])


def _tokenizer_of(folder, config, hf_config):
    """The CorpusTokenizer of a folder, None if it has none."""
    # a GPU machine may lack what reads corpora; an import alone needs it
    from data.corpus_tokenizer import load_tokenizer
    names = ('tokenizer.json', 'tokenizer.model')
    if not any((folder / name).is_file() for name in names):
        return None
    eot_token = None
    if (folder / 'tokenizer.json').is_file():
        vocabulary = read_tokenizer(folder, config.vocab_size).get_vocab()
        eot_id = eot_of(hf_config, vocabulary)
        eot_token = next((token for token, number in vocabulary.items()
                          if number == eot_id), None)
    return load_tokenizer(folder, eot_token=eot_token,
                          vocab_size=config.vocab_size)


@torch.no_grad()
def check_model(name_or_path, text_file, *, tokens=1024) -> float:
    """Print how far this project and transformers are apart on a text.

    Both read the same folder in float32, and score the first `tokens` ids.
    Returns the largest difference of the logits.
    """
    folder = locate(name_or_path)
    found = open_model(f'hf:{folder}', attention_backend='sdpa')
    ids = found.tokenizer.encode(Path(text_file).read_text('utf-8')).ids
    ids = torch.tensor([ids[:min(tokens, found.model.config.block_size)]])
    if ids.shape[1] < 2:
        raise ConversionError(f'{text_file} has fewer than two tokens')
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True).eval()
    ours, theirs = found.model(ids)[0], hf(ids).logits
    difference = (ours - theirs).abs().max().item()
    print(f'{ids.shape[1]} tokens; largest difference of the logits '
          f'{difference:.1e}, their spread {theirs.std().item():.2f}')
    for name, logits in ('here', ours), ('transformers', theirs):
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        print(f'perplexity, {name}: {loss.exp().item():.5f}')
    return difference


def main(argv=None):
    first, *_ = __doc__.split('\n\n')
    parser = argparse.ArgumentParser(
        description=first, epilog=__doc__[len(first):],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def add(name, function, what, source, meaning):
        command = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + '.',
            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(function=function)
        command.add_argument('source', metavar=source, help=meaning)
        return command

    published = 'HF_NAME_OR_PATH', 'a folder, or a name of the hub'
    for command in (
            add('import', import_model, 'a Hugging Face model into a '
                'checkpoint', *published),
            add('export', export_model, 'a run or checkpoint into a Hugging '
                'Face folder', 'RUN_OR_CHECKPOINT', 'an out_dir (its newest '
                'run), a run folder, a checkpoint or an imported folder')):
        command.add_argument('out', metavar='OUT', help='the folder to write')
        command.add_argument(
            '--dtype', choices=('float32', 'bfloat16', 'float16'),
            default='float32', help='of the weights that are written')
        command.add_argument(
            '--max_shard_size', default='5GB', type=_size, metavar='SIZE',
            help='largest file of weights, e.g. 500MB')
        command.add_argument(
            '--overwrite', action='store_true',
            help='replace OUT, if it is a folder of a model')
    command = add('check', check_model, 'compare logits and perplexity with '
                  'transformers', *published)
    command.add_argument('text_file', metavar='TEXT_FILE',
                         help='a UTF-8 file, whose beginning is scored')
    command.add_argument('--tokens', type=int, default=1024,
                         help='so many tokens of it')
    arguments = vars(parser.parse_args(argv))
    function = arguments.pop('function')
    arguments.pop('command')
    second = 'text_file' if 'text_file' in arguments else 'out'
    try:
        result = function(arguments.pop('source'), arguments.pop(second),
                          **arguments)
    except (ValueError, OSError) as error:
        exit_with(error)
    if second == 'out':
        print(f'written: {result}')


def _size(text: str) -> str:
    if not re.fullmatch(r'[1-9]\d*(KB|MB|GB|TB)', text):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size; write e.g. 500MB or 5GB')
    return text


if __name__ == '__main__':
    main()
