"""The README.md of an exported model: what it is and where it comes from."""

from training.run_log import read_metrics, source_commit


def model_card(source, name: str, parameters: int, dtype: str) -> str:
    """Markdown; `source` is a model_source.Source."""
    record, state = source.record, source.state
    rows = [('architecture', source.config.get_architecture_name()),
            ('parameters', f'{parameters:,}'),
            ('context', f'{source.config.block_size:,} tokens'),
            ('vocabulary', f'{source.config.vocab_size:,} rows'),
            ('weights', dtype)]
    if record is None:
        rows.append(('weights from', state['imported']['from']))
        made = ''
    else:
        data, tokens = record['dataset'], (
            state['step'] * record['tokens_per_iter'])
        rows += [
            ('data', f'{data["name"]} ({data["train_tokens"]:,} training '
                     f'tokens, fingerprint {data["fingerprint"][:16]})'),
            ('tokenizer', f'{data["tokenizer"]["name"]}, '
                          f'{data["tokenizer"]["size"]} ids'),
            ('trained on', f'{tokens:,} tokens in {state["step"]:,} updates'),
            ('bits per byte', _bits_per_byte(source)),
            ('run', record['run_id']),
            ('commit', record['commit'] or 'not recorded')]
        # what auto resumes is this run itself
        if record['options']['init_from'] not in ('scratch', 'auto'):
            rows.append(('begun from', record['options']['init_from']))
        made = ('\nMade with\n\n    python ' + ' '.join(record['command'])
                + '\n')
    rows.append(('exported by commit', source_commit() or 'not recorded'))
    table = '\n'.join(f'| {key} | {value} |' for key, value in rows)
    return (f'---\nlibrary_name: transformers\npipeline_tag: text-generation\n'
            f'---\n\n# {name}\n\n| | |\n| --- | --- |\n{table}\n{made}')


def _bits_per_byte(source) -> str:
    """Of the last evaluation up to the checkpoint's step."""
    step = source.state['step']
    found = [r for r in read_metrics(source.run)[0]
             if r['kind'] == 'eval' and r['step'] <= step]
    if not found or found[-1].get('val_bpb') is None:
        return 'not measured'
    at = '' if found[-1]['step'] == step else (
        f' at update {found[-1]["step"]:,}')
    return (f'{found[-1]["val_bpb"]:.4f}{at}, on '
            f'{source.record["dataset"]["eval_bytes"]:,} bytes of validation '
            'text')
