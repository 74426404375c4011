"""Your own corpus with any tokenizer, into data/NAME.

    python data/custom/prepare.py --input texts/ --tokenizer qwen3 --name mine
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.tokenize_corpus import Corpus, main  # noqa: E402

CORPUS = Corpus(folder=HERE, inputs=None, tokenizer=None)

if __name__ == "__main__":
    main(CORPUS, __doc__)
