"""A model with its tokenizer, from a run, a checkpoint or a Hugging Face
folder."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from hf_convert import from_hf
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.checkpoint import find_checkpoint, load_weights, read_state
from training.dataset import open_dataset
from training.run_log import read_record, resolve_run


class Opened(NamedTuple):
    model: ConfigurableGPT
    tokenizer: Tokenizer
    eot_id: int
    source: str


def open_model(path, device) -> Opened:
    path = Path(path)
    if (path / 'config.json').exists():
        import transformers
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype='float32')
        tokenizer = Tokenizer.from_file(str(path / 'tokenizer.json'))
        eos = transformers.AutoTokenizer.from_pretrained(path).eos_token_id
        return Opened(from_hf(hf).to(device).eval(), tokenizer, eos, str(path))
    checkpoint = find_checkpoint(
        path if (path / 'state.json').exists() else resolve_run(path))
    config = ModelArchitectureConfig.from_dict(
        read_state(checkpoint)['architecture'])
    model = ConfigurableGPT(config).to(device).eval()
    load_weights(checkpoint, model)
    record = read_record(checkpoint.parent.parent)
    dataset = open_dataset(record['dataset']['folder'])
    if dataset.tokenizer_folder is None:
        raise ValueError(f'the dataset {dataset.folder} has no tokenizer, so '
                         'that its ids cannot be read as text')
    tokenizer = Tokenizer.from_file(
        str(dataset.tokenizer_folder / 'tokenizer.json'))
    return Opened(model, tokenizer, dataset.eot_id, str(checkpoint))
