"""The record of a run (run.json), its comparison, and the startup report."""

from training.flops import flops_per_token
from training.run_log import RunError, source_commit, versions
from training.terminal import print_rows

# architecture fields that change how the model computes, not what
FREE_FIELDS = ('attention_backend',)


def make_record(parsed, plan, dataset, eval_set, argv, ranks) -> dict:
    """run.json; the parameters are counted once the model is built."""
    config = plan['config']
    full, causal = flops_per_token(config)
    tokenizer = dataset.meta.get('tokenizer') or {}
    return {
        'command': ['train.py', *argv],
        'options': parsed.values,
        'options_given': parsed.given,
        'arch_preset': parsed.values['arch_preset'],
        'architecture': config.to_dict(),
        'architecture_name': config.get_architecture_name(),
        'flops_per_token': full,
        'flops_per_token_causal': causal,
        'tokens_per_iter': plan['tokens_per_iter'],
        'max_iters': plan['max_iters'],
        'schedule': plan['schedule'],
        'world_size': ranks.world_size,
        'strategy': strategy_name(parsed.values, ranks),
        'device': plan['device_name'],
        'dtype': plan['dtype'][0],
        'peak_tflops': plan['peak_tflops'],
        'attention': plan['attention'][0],
        'dataset': {
            'name': dataset.name,
            'folder': str(dataset.folder),
            'fingerprint': dataset.fingerprint,
            'vocab_size': dataset.vocab_size,
            'tokenizer': {key: tokenizer.get(key)
                          for key in ('name', 'size', 'sha256')},
            'train_tokens': dataset.split('train').tokens,
            'val_text_sha256': dataset.split('val').text_sha256,
            'eval_bytes_wanted': plan['eval_bytes'],
            'eval_documents': eval_set.documents,
            'eval_bytes': eval_set.bytes,
            'eval_tokens': eval_set.tokens,
            'eval_text_sha256': eval_set.text_sha256,
        },
        'versions': versions(),
        'commit': source_commit(),
    }


def compare_with_record(recorded: dict, now: dict):
    """Raise RunError if a run cannot go on under what is asked for now."""

    def essential(record):
        architecture = {k: v for k, v in record['architecture'].items()
                        if k not in FREE_FIELDS}
        return architecture | {
            'dataset': record['dataset']['name'],
            'the bins of the dataset': record['dataset']['fingerprint'],
            'tokens per update': record['tokens_per_iter'],
            'seed': record['options']['seed']}

    was, is_now = essential(recorded), essential(now)
    problems = [f'{key}: {was[key]} in the run, {is_now[key]} now'
                for key in was if was[key] != is_now[key]]
    if problems:
        raise RunError(
            f'{recorded["run_id"]} cannot be resumed with other essentials:\n'
            + '\n'.join(f'  {p}' for p in problems)
            + '\nLeave these options out, or start a new run with '
            '--init_from=scratch.')


def strategy_name(options: dict, ranks) -> str:
    if ranks.world_size == 1:
        return 'single'
    return ('FSDP2' if options['use_fsdp'] else
            'DDP with ZeRO-1' if options['use_zero1'] else 'DDP')


def with_reason(choice: tuple[str, str]) -> str:
    """'sdpa (why)' for what runs in place of what was asked for."""
    name, reason = choice
    return name if reason == 'as configured' else f'{name} ({reason})'


def print_report(record, run, plan, start_step):
    """What was built, as opposed to what was asked for."""
    options, data = record['options'], record['dataset']
    parameters = record['parameters']
    tokens = plan['tokens_per_iter'] * plan['max_iters']
    flops = record['flops_per_token']
    rows = [
        ('run', f'{run.folder}'
                + (f', resumed at step {start_step:,}' if start_step else '')),
        ('architecture', f'{record["arch_preset"]}: '
                         f'{record["architecture_name"]}'),
        ('parameters', f'{parameters["total"]:,} '
                       f'({parameters["non_embedding"]:,} non-embedding)'),
        ('data', f'{data["name"]}: {data["train_tokens"]:,} training tokens, '
                 f'{plan["config"].vocab_size:,} rows'),
        ('evaluation', f'{data["eval_tokens"]:,} tokens'
                       + (f' of {data["eval_documents"]:,} documents, '
                          f'{data["eval_bytes"]:,} bytes'
                          if data['eval_bytes'] else '')),
        ('batch', f'{options["batch_size"]} x {plan["config"].block_size} '
                  f'tokens x {options["gradient_accumulation_steps"]} '
                  f'micro-steps = '
                  f'{plan["tokens_per_iter"]:,} tokens an update'),
        ('budget', f'{plan["max_iters"]:,} updates = {tokens:,} tokens, '
                   f'{tokens / data["train_tokens"]:.2f} epochs'),
        ('FLOPs', f'{flops / 1e9:.4g} G a token '
                  f'({record["flops_per_token_causal"] / 1e9:.4g} G causal), '
                  f'{flops * tokens:.3g} in all'),
        ('processes', f'{record["world_size"]}, {record["strategy"]}; '
                      'optimizer state at most '
                      f'{max(record["optimizer_bytes_per_rank"]):,} bytes '
                      'each'),
        ('device', f'{record["device"]}, '
                   + ('compiled' if options['compile'] else 'not compiled')),
        ('dtype', with_reason(plan['dtype'])),
        ('attention', with_reason(plan['attention'])),
    ]
    if plan['recomputation'][0] == 'full':
        rows.append(('activations', 'computed again, '
                     + with_reason(plan['recomputation'])))
    elif options['activation_memory_budget'] < 1:
        rows.append(('activations', 'computed again to keep within a budget '
                     f'of {options["activation_memory_budget"]:g}'))
    if plan['schedule']['warmup_iters'] >= plan['max_iters']:
        rows.append(('warm-up', f'{plan["schedule"]["warmup_iters"]} updates: '
                                'the run ends before its learning rate'))
    rows += [(option, 'has no effect: one process has nothing to share')
             for option in ('use_zero1', 'use_fsdp')
             if options[option] and record['world_size'] == 1]
    print_rows(rows)
    print(flush=True)
