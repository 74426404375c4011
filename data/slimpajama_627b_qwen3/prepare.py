"""SlimPajama-627B with the Qwen3 tokenizer, on one machine or on many.

    python data/slimpajama_627b_qwen3/prepare.py --shard 0/16   # ... 15/16
    python data/slimpajama_627b_qwen3/prepare.py --merge
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from data.tokenize_corpus import Corpus, main  # noqa: E402

CORPUS = Corpus(
    folder=HERE,
    inputs="hub:cerebras/SlimPajama-627B:train/*.jsonl.zst",
    tokenizer="qwen3",
    # 59,166 files of about 46 MB of text: 1,233 lanes, one bin of 2 GB each.
    files_per_lane=48,
    part_tokens=2**30,
)

if __name__ == "__main__":
    main(CORPUS, __doc__)
