"""Generate text from a trained run or a model in Hugging Face's format.

    python sample.py --out_dir=out-quickstart --prompt="def main():"
    python sample.py --out_dir=out-quickstart --stop="['\\ndef ']" \\
        --prompt="['def ', 'class ']"
    python sample.py --out_dir=out-quickstart --prompt_file=prompts.txt
"""

import signal
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from model_generation import hold_in_bf16
from training.configurator import (
    ConfigError,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Share,
    configure,
    exit_with,
)
from training.device import DTYPES, resolve_device
from training.model_source import OpenModel, open_model
from training.text_stream import TextStream

# what to sample from
out_dir: str = 'out'  # an out_dir (its newest run), a run, a checkpoint, a
  # folder of Hugging Face, or hf:NAME for one of the hub

# prompts
prompt: str | list[str] = ''  # what to continue, or a list; empty: the start
  # of a document
prompt_file: str | None = None  # a UTF-8 file of prompts, one a line; empty
  # lines are left out
prompt_separator: str = ''  # the line between prompts of several lines in
  # prompt_file, e.g. ---; empty: every line is a prompt
special_tokens: bool = False  # read <|endoftext|> and the like in a prompt as
  # the tokens of that name, not as plain text

# the text
num_samples: Positive = 3  # of each prompt
max_new_tokens: Positive = 400
stop: str | list[str] = []  # strings that end a sample, and are not printed
stop_at_eot: bool = True  # end a sample at an end-of-text token
temperature: NonNegativeFloat = 0.8  # 0: always the likeliest token
top_k: Positive | None = 200  # draw among the k likeliest tokens
top_p: Share | None = None  # draw among the fewest with this probability
seed: NonNegative = 1337  # of the first sample; the next has the next

# system
batch_size: Positive = 8  # samples that are generated together
device: str = 'auto'
dtype: Literal[tuple(DTYPES)] = 'float32'  # what the weights are held in


def main():
    try:
        configure(globals(), __file__, sys.argv[1:])
        texts, ends = read_prompts(), [stop] * isinstance(stop, str) or stop
        if '' in ends:
            raise ConfigError(['stop: an empty string would end every sample '
                               'at once; leave it out'])
        target = resolve_device(device)
        found = load(target)
        model, tokenizer, eot_id = found.model, found.tokenizer, found.eot_id
        prompts = encode(tokenizer, found.start_id, texts,
                         model.config.block_size)
    except ValueError as error:
        exit_with(error)
    # a character that the terminal lacks is no reason to stop
    sys.stdout.reconfigure(errors='replace')
    rows = [ids for ids in prompts for _ in range(num_samples)]
    n_tokens, begin = 0, time.perf_counter()
    interrupted = end_at_ctrl_c()
    try:
        for first in range(0, len(rows), batch_size):
            batch = rows[first:first + batch_size]
            eos_id = eot_id if stop_at_eot else None
            printer = Printer(tokenizer, batch, first, len(rows), ends, eos_id,
                              interrupted)
            model.generate(
                batch, max_new_tokens, temperature, top_k, top_p,
                n_ids=tokenizer.get_vocab_size(), eos_id=eos_id,
                generator=[torch.Generator(target).manual_seed(seed + first + i)
                           for i in range(len(batch))],
                on_token=printer.add)
            printer.close()
            n_tokens += printer.n_tokens
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None
    seconds = time.perf_counter() - begin
    print(f'{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} '
          'tokens/s, prompts included', file=sys.stderr)


def end_at_ctrl_c() -> list:
    """From now on Ctrl-C puts a number into this list, for the next token to
    see, and ends the program at once when it comes again: an exception that
    is raised wherever the program just is can be lost in a callback."""
    interrupted = []

    def interrupt(number, _frame):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    signal.signal(signal.SIGINT, interrupt)
    return interrupted


def load(target) -> OpenModel:
    """The model that out_dir names, with its weights held in `dtype`."""
    found = open_model(out_dir, target)
    if dtype == 'bfloat16':
        hold_in_bf16(found.model)
    return found


class Printer:
    """Prints the samples of a batch in order: the first that has not ended
    as its tokens come, what the others have when it is their turn."""

    def __init__(self, tokenizer, batch, first, total, stop, eos_id,
                 interrupted):
        self.first, self.total, self.eos_id = first, total, eos_id
        self.interrupted = interrupted
        # the id that a document begins after is not shown
        self.streams = [TextStream(tokenizer, ids[1:], stop) for ids in batch]
        self.waiting = [stream.prompt_text for stream in self.streams]
        self.ended = [False] * len(batch)
        self.current = self.n_tokens = 0
        self._head()

    def add(self, row: int, token: int) -> bool:
        """Take up a token; whether the sample ends with it.

        Raises KeyboardInterrupt after Ctrl-C.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        stream = self.streams[row]
        self.n_tokens += 1
        self._print(row, stream.add(token))
        if stream.stopped or token == self.eos_id:
            self._end(row)
        return stream.stopped

    def close(self):
        """Take it that all have ended."""
        for row, ended in enumerate(self.ended):
            if not ended:
                self._end(row)

    def _end(self, row):
        self._print(row, self.streams[row].end())
        self.ended[row] = True
        while self.current < len(self.ended) and self.ended[self.current]:
            print(flush=True)
            self.current += 1
            self._head()

    def _head(self):
        if self.current < len(self.streams):
            print(f'--- sample {self.first + self.current + 1} of {self.total}')
            print(self.waiting[self.current], end='', flush=True)

    def _print(self, row, text):
        if row == self.current:
            print(text, end='', flush=True)
        else:
            self.waiting[row] += text


def read_prompts() -> list[str]:
    """The prompts that the options name; ValueError if they name none."""
    if prompt_file is None:
        if prompt_separator:
            raise ConfigError(['prompt_separator: it separates the prompts of '
                               'a file; give prompt_file'])
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not texts:
            raise ConfigError(['prompt: the list is empty'])
        return texts
    if prompt:
        raise ConfigError(['prompt and prompt_file: give one of them'])
    try:
        lines = Path(prompt_file).read_text(encoding='utf-8').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f'prompt_file={prompt_file} cannot be read as '
                           f'UTF-8: {error}']) from error
    texts = lines
    if prompt_separator:
        texts = [[]]
        for line in lines:
            if line == prompt_separator:
                texts.append([])
            else:
                texts[-1].append(line)
        texts = ['\n'.join(part).strip('\n') for part in texts]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError([f'prompt_file={prompt_file} holds no prompt'])
    return texts


def encode(tokenizer, start_id, texts, block_size) -> list[list[int]]:
    """The ids of each prompt, after the id that a document begins after in
    training; a prompt that the model cannot read whole is named."""
    tokenizer.encode_special_tokens = not special_tokens
    prompts = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) + 1 > block_size:
            print(f'prompt {number + 1} has {len(ids)} tokens: the model reads '
                  f'the last {block_size}', file=sys.stderr)
        prompts.append([start_id, *ids])
    return prompts


if __name__ == '__main__':
    main()
