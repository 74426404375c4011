"""Downstream tasks of EleutherAI's lm-eval on a model of this project.

    pip install -r requirements-eval.txt
    python eval.py out-quickstart --tasks arc_easy,hellaswag --limit 100

The model answers lm-eval's three kinds of requests as lm-eval's own `hf` model
does, so that both give the same results; nothing is exported for it.
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md
"""

import difflib
import importlib.metadata
import random
from pathlib import Path

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from training.device import autocast

SEED = 1234  # lm-eval's own, of examples and of what is drawn
POSITIONS = 1024  # whose logits are held at once
# of a task's generation_kwargs; what else they ask for is refused
DRAWN_BY = {'do_sample', 'temperature', 'top_k', 'top_p'}


class Adapter(TemplateLM):
    """A ConfigurableGPT in evaluation mode, as lm-eval asks for it.

    `special_tokens`: the tokenizer may put tokens of its own before a text.
    `start_id` stands before a text that has no context.
    """

    def __init__(self, model, tokenizer, *, eot_id, start_id, special_tokens,
                 max_length, batch_size, device, dtype):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._eot_id, self._start_id = eot_id, start_id
        self._special_tokens = special_tokens
        self._device, self._dtype = device, dtype

    @property
    def eot_token_id(self):
        return self._eot_id

    @property
    def prefix_token_id(self):
        return self._start_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        first = self.tokenizer.id_to_token(self._start_id)
        wanted = (not string.startswith(first) if add_special_tokens is None
                  else add_special_tokens)
        return self.tokenizer.encode(
            string, add_special_tokens=wanted and self._special_tokens).ids

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[(sum of log p, is it what greedy decoding gives)] of requests
        (_, context ids, continuation ids).

        Requests that differ in their last token alone, as the answers A, B,
        C, D do, share a forward pass.
        """
        sharing, answers = {}, [None] * len(requests)
        for number, (_, before, after) in enumerate(requests):
            if not 0 < len(after) <= self.max_length:
                raise ValueError(
                    f'a task asks for the likelihood of {len(after)} tokens; '
                    f'between 1 and {self.max_length} can be scored')
            # what does not fit loses its beginning
            ids = (before + after)[-self.max_length - 1:]
            sharing.setdefault(tuple(ids[:-1]), []).append((number, after))
        inputs = sorted(sharing, key=len, reverse=True)  # the longest first
        progress = tqdm(total=len(requests), desc='log-likelihoods',
                        disable=True if disable_tqdm else None)
        for at in range(0, len(inputs), self.batch_size):
            batch = inputs[at:at + self.batch_size]
            x = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            for row, ids in enumerate(batch):
                x[row, :len(ids)] = torch.tensor(ids)
            with autocast(self._device, self._dtype):
                hidden = self.model.hidden_states(x.to(self._device))
            for states, ids in zip(hidden, batch, strict=True):
                for number, after in sharing[ids]:
                    answers[number] = self._score(
                        states[len(ids) - len(after):len(ids)], after)
                    progress.update()
        progress.close()
        return answers

    def _score(self, states, ids):
        """states (N, C) of the positions before `ids`."""
        total, greedy = 0.0, True
        targets = torch.tensor(ids, device=states.device)
        for part, wanted in zip(states.split(POSITIONS),
                                targets.split(POSITIONS), strict=True):
            with autocast(self._device, self._dtype):
                logits = self.model.lm_head(part)             # (N, V)
            logp = logits.float().log_softmax(-1)
            total += logp.gather(1, wanted[:, None]).sum().item()
            greedy = greedy and bool((logp.argmax(-1) == wanted).all())
        return total, greedy

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Sums of log p of whole texts, in windows that do not overlap but
        for the last, which has a full context."""
        windows, counts = [], []
        for (string,) in (request.args for request in requests):
            found = [(None, *make_disjoint_window(pair))
                     for pair in get_rolling_token_windows(
                         self.tok_encode(string), self.prefix_token_id,
                         max_seq_len=self.max_length, context_len=1)]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(n)) for n in counts]

    def generate_until(self, requests, disable_tqdm=False):
        """Texts up to a stop string or an end of text, without it."""
        kinds, texts = {}, [None] * len(requests)
        for number, (prompt, given) in enumerate(r.args for r in requests):
            kinds.setdefault(repr(given), (given, []))[1].append(
                (number, self.tok_encode(prompt) or [self._start_id]))
        progress = tqdm(total=len(requests), desc='generation',
                        disable=True if disable_tqdm else None)
        for given, prompts in kinds.values():
            options, stop = self._understood(given)
            # alike in length: the shorter are padded
            prompts.sort(key=lambda prompt: len(prompt[1]), reverse=True)
            for at in range(0, len(prompts), self.batch_size):
                numbers, ids = zip(*prompts[at:at + self.batch_size],
                                   strict=True)
                for number, text in zip(
                        numbers, self._generate(ids, options, stop),
                        strict=True):
                    texts[number] = text
                    progress.update()
        progress.close()
        return texts

    def _understood(self, given: dict) -> tuple[dict, list[str]]:
        """(options for generate, stop strings) of a task's."""
        wanted = normalize_gen_kwargs(given, default_max_gen_toks=256)
        eot = self.tokenizer.id_to_token(self._eot_id)
        stop = handle_stop_sequences(wanted.pop('until', None), eos=eot)
        n_new = wanted.pop('max_gen_toks')
        if unknown := sorted(wanted.keys() - DRAWN_BY):
            raise ValueError('a task asks for generation with '
                             f'{", ".join(unknown)}, which is not supported')
        if n_new >= self.max_length:
            raise ValueError(
                f'a task asks for {n_new} new tokens, and the context of the '
                f'model has {self.max_length} in all; leave it out, or set '
                'max_gen_toks in its generation_kwargs')
        temperature = wanted['temperature'] if wanted['do_sample'] else 0
        return {'max_new_tokens': n_new, 'temperature': temperature,
                'top_k': wanted.get('top_k'),
                'top_p': wanted.get('top_p')}, [text for text in stop if text]

    def _generate(self, prompts, options: dict, stop: list[str]) -> list[str]:
        # what does not fit beside the new tokens loses its beginning
        room = self.max_length - options['max_new_tokens']
        prompts = [ids[-room:] for ids in prompts]
        drawn = [[] for _ in prompts]
        # no token has less than a byte of a stop string
        reach = max(len(text.encode()) for text in stop) + 1

        def stopped(row, new):
            drawn[row].append(new)
            end = self.tokenizer.decode(drawn[row][-reach:])
            return any(text in end for text in stop)

        generators = [torch.Generator(self._device).manual_seed(SEED)
                      for _ in prompts]
        with autocast(self._device, self._dtype):
            self.model.generate(
                prompts, **options, n_ids=self.tokenizer.get_vocab_size(),
                eos_id=self._eot_id, generator=generators, on_token=stopped)
        return [postprocess_generated_text(self.tokenizer.decode(ids), stop,
                                           None) for ids in drawn]


def load_tasks(names: list[str], include_path=None) -> dict:
    """lm-eval's tasks of these names; ValueError for unknown ones.

    Those of `include_path` are looked up first: to read all of lm-eval's own
    takes half a minute.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f'include_path={include_path} is not a folder: it '
                         'is to hold the YAML files of tasks')
    names = [name.strip() for name in names if name.strip()]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ValueError('\n  '.join([
            f'{len(unknown)} unknown task(s) of {len(names)}:',
            *(name + nearest(name, manager.all_tasks) for name in unknown),
            'lm-eval ls tasks lists those of lm-eval; --include_path=FOLDER '
            'adds your own']))
    return manager.load(names)


def nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def run_tasks(adapter: Adapter, loaded: dict, *, limit=None,
              num_fewshot=None) -> list[dict]:
    """A result for each task and group.

    As lm-eval's simple_evaluate, without its report on the machine, which
    takes longer than a small task.
    """
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded['tasks'].values():
        own = task.get_config('num_fewshot')
        if num_fewshot is not None and own != 0:  # 0: the task allows no other
            task.set_config(key='num_fewshot', value=num_fewshot)
        elif own is None:
            task.set_config(key='num_fewshot', value=0)
        task.set_fewshot_seed(seed=SEED)
    found = evaluator.evaluate(adapter, loaded, limit=limit, log_samples=False)
    version = importlib.metadata.version('lm_eval')
    results = []
    found['results'] |= found.get('groups', {})
    for task, values in found['results'].items():
        metrics, stderr = {}, {}
        for key, value in values.items():
            name, comma, which = key.partition(',')
            if not comma or not isinstance(value, (int, float)):
                continue  # what it is called, and what is not known
            kind = stderr if name.endswith('_stderr') else metrics
            name = name.removesuffix('_stderr')
            kind[name if which == 'none' else f'{name},{which}'] = value
        results.append({
            'kind': 'task', 'task': task, 'metrics': metrics,
            'stderr': stderr, 'limit': limit,
            'questions': found['n-samples'].get(task, {}).get('effective'),
            'num_fewshot': found['n-shot'].get(task),
            'version': found['versions'].get(task), 'lm_eval': version})
    return results
