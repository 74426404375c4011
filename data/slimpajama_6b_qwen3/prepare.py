"""SlimPajama-6B with the Qwen3 tokenizer.

    python data/slimpajama_6b_qwen3/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.tokenize_corpus import Corpus, main  # noqa: E402

CORPUS = Corpus(
    folder=HERE,
    inputs="hub:DKYoon/SlimPajama-6B:data/train-*.parquet",
    tokenizer="qwen3",
)

if __name__ == "__main__":
    main(CORPUS, __doc__)
