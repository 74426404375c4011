"""SlimPajama-6B with the GPT-2 tokenizer.

    python data/slimpajama_6b_gpt2/prepare.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.tokenize_corpus import Corpus, main  # noqa: E402

CORPUS = Corpus(
    folder=HERE,
    inputs="hub:DKYoon/SlimPajama-6B:data/train-*.parquet",
    tokenizer="gpt2",
)

if __name__ == "__main__":
    main(CORPUS, __doc__)
