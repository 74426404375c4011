"""SlimPajama-6B with the LLaMA-2 tokenizer.

    python data/slimpajama_6b_llama2/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.tokenize_corpus import Corpus, main  # noqa: E402

CORPUS = Corpus(
    folder=HERE,
    inputs="hub:DKYoon/SlimPajama-6B:data/train-*.parquet",
    tokenizer="llama2",
)

if __name__ == "__main__":
    main(CORPUS, __doc__)
