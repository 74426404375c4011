"""A model with its tokenizer, from a run, a checkpoint or a Hugging Face
folder."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from hf_convert import from_hf
from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.checkpoint import find_checkpoint, load_weights, read_state
from training.dataset import open_dataset
from training.run_log import read_record, resolve_run


@dataclass(frozen=True)
class Source:
    kind: str  # 'run' or 'huggingface'
    folder: Path
    run: Path | None
    record: dict | None
    state: dict | None


@dataclass(frozen=True)
class OpenModel:
    model: ConfigurableGPT
    tokenizer: Tokenizer
    eot_id: int
    source: Source


def open_model(path, device='cpu') -> OpenModel:
    path = Path(path)
    if (path / 'config.json').exists():
        import transformers
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype='float32')
        tokenizer = Tokenizer.from_file(str(path / 'tokenizer.json'))
        eos = transformers.AutoTokenizer.from_pretrained(path).eos_token_id
        return OpenModel(from_hf(hf).to(device).eval(), tokenizer, eos,
                         Source('huggingface', path, None, None, None))
    checkpoint = find_checkpoint(
        path if (path / 'state.json').exists() else resolve_run(path))
    state = read_state(checkpoint)
    config = ModelArchitectureConfig.from_dict(state['architecture'])
    model = ConfigurableGPT(config).to(device).eval()
    load_weights(checkpoint, model)
    run = checkpoint.resolve().parent.parent
    record = read_record(run)
    dataset = open_dataset(record['dataset']['folder'])
    if dataset.tokenizer_folder is None:
        raise ValueError(f'the dataset {dataset.folder} has no tokenizer, so '
                         'that its ids cannot be read as text')
    tokenizer = Tokenizer.from_file(
        str(dataset.tokenizer_folder / 'tokenizer.json'))
    return OpenModel(model, tokenizer, dataset.eot_id,
                     Source('run', checkpoint, run, record, state))
