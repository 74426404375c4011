"""What the documents say is so: their commands run, their links lead
somewhere, their tables are what plan.py prints, their examples work.

A command that trains runs for a few steps here, one that needs a GPU, a hub or
hours is checked for its options; which is which stands in RULES. A command
that no rule knows fails.
"""

import ast
import functools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT

from model_builder import ConfigurableGPT

DOCUMENTS = sorted(
    [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('data/*/*.md')])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PROGRAMS = ('python', 'torchrun', 'make', 'pip', '.', 'hf', 'sbatch', 'bash',
            'vllm', 'transformers', 'curl', 'git', 'cd', 'for')

# a few steps in place of the whole run; the last of an option counts
SHORT = ('--max_iters=2', '--eval_interval=2', '--eval_bytes=2000',
         '--log_interval=1', '--warmup_iters=0', '--checkpoint_interval=1')

# (what the command looks like, what is done with it), the first that fits
RULES = [
    # the tables under it have a test of their own
    (r'for config in config/full_', 'tables'),
    # of another machine, or of another project
    (r'(hf|sbatch|vllm|transformers|curl|git|cd) |build/bin/llama', 'not here'),
    (r'python convert_hf_to_gguf.py', 'not here'),
    (r'\. .venv/bin/activate', 'not here'),
    (r'pip install', 'requirements'),
    (r'make ', 'make'),
    # hours, or the hub; train.py's own checks of options and architecture
    (r'python data/.*slimpajama', 'options'),
    (r'(python|torchrun .*) ?train.py .*(config/full_|out-qwen3)', 'planned'),
    (r'.*(hf:|Qwen/|out-qwen3|openai-community|--tasks)', 'options'),
    (r'python train.py config/\.\.\.', 'options'),
    (r'.*\b(PATH|NAME|CONFIG|FILES?|DIR|RUN|OUT)\b', 'options'),
    # what the tests themselves are, or what measures for minutes
    (r'.* -m pytest|python tests/|(python|bash) benchmarks/', 'options'),
    (r'python data/download_qwen3_tokenizer.py', 'tokenizer'),
    (r'python data/', 'run'),
    (r'(python|torchrun .*) ?train.py .*--help', 'run'),
    (r'(python|torchrun .*) ?train.py ', 'short'),
    (r'python sweep.py ', 'dry'),
    (r'python sample.py ', 'sample'),
    (r'python (compare_architectures|plan|eval|hf_convert)\.py ', 'run'),
    (r'python -c ', 'run'),
]


def commands_of(path: Path) -> list[str]:
    """The commands in the indented and fenced blocks of a document, each on
    one line; blocks that begin with no command are output or code."""
    blocks, block, fence = [], [], None
    for line in path.read_text().splitlines():
        if line.startswith('```'):
            if fence is None:
                fence, block = line[3:].strip(), []
            else:
                if fence in ('', 'sh', 'bash'):
                    blocks.append(block)
                fence, block = None, []
        elif fence is not None or line.startswith('    '):
            block.append(line if fence is not None else line[4:])
        elif block:
            blocks.append(block)
            block = []
    blocks.append(block)
    commands = []
    for block in blocks:
        lines = re.sub(r' *\\\n\s*', ' ', '\n'.join(block)).splitlines()
        lines = [re.sub(r'(^|\s{2,})#.*', '', line).strip() for line in lines]
        lines = [line for line in lines if line]
        if not lines or lines[0].split()[0] not in PROGRAMS:
            continue
        if lines[0].startswith('for ') or '<<' in lines[0]:
            commands.append(' '.join(lines))
            continue
        quoted = ''  # a quoted text may go over lines
        for line in lines:
            if line.startswith('{'):  # what the command above prints
                break
            quoted = f'{quoted} {line}'.strip()
            if quoted.count("'") % 2 == 0 and quoted.count('"') % 2 == 0:
                commands.append(quoted)
                quoted = ''
        assert not quoted, f'{path.name}: a quote is not closed: {quoted}'
    return commands


def rule_of(command: str) -> str | None:
    for pattern, rule in RULES:
        if re.match(pattern, command):
            return rule
    return None


def arguments_of(command: str, folder: Path) -> list[str]:
    """What the shell would hand over, without the program; globs filled in."""
    words = []
    for word in shlex.split(command)[1:]:
        found = ('*' in word and '(' not in word
                 and sorted(str(p.relative_to(folder))
                            for p in folder.glob(word)))
        words += found or [word]
    return words


@pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)
def test_every_command_has_a_rule(path):
    commands = commands_of(path)
    assert [c for c in commands if rule_of(c) is None] == []
    for command in commands:
        check_without_running(command, rule_of(command))


def check_without_running(command, rule):
    words = shlex.split(re.sub(r'\$\(.*?\)', 'X', command))
    if rule == 'requirements':
        for name in re.findall(r'-r (\S+)', command):
            assert (ROOT / name).exists(), command
    elif rule == 'make':
        target = words[1].partition('=')[0]
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(),
                         re.MULTILINE), command
    elif rule == 'planned':
        check_planned(command)
    elif rule == 'options' and words[0] in ('python', 'bash'):
        script = next((ROOT / w for w in words[1:]
                       if w.endswith(('.py', '.sh'))), None)
        if script is None:
            return
        assert script.exists(), command
        # options that a script takes from elsewhere
        others = {'prepare.py': 'data/corpus_options.py',
                  'bench.py': 'train.py', 'gpu_suite.sh':
                  'benchmarks/gpu_suite.py'}
        known = script.read_text()
        if script.name in others:
            known += (ROOT / others[script.name]).read_text()
        for word in words:
            option = re.match(r'--(\w+)', word)
            if option:
                name = option[1].replace('-', '_')
                assert re.search(rf'--{option[1]}\b|^{name}: |{name}=',
                                 known, re.MULTILINE), (
                    f'{script.name} has no --{option[1]}: {command}')


def check_planned(command):
    """The options, files and architecture of a run that is too large for
    here."""
    from plan import planned_setting
    words = shlex.split(command)
    ranks = re.search(r'--nproc_per_node=(\d+)', command)
    argv = words[words.index('train.py') + 1:]
    n_gpus = int(ranks[1]) if ranks else 1
    recorded = [] if 'config/full_' in command else [  # in the run it resumes
        '--vocab_size=151936', f'--gradient_accumulation_steps={n_gpus}']
    planned_setting([word for word in [*argv, *recorded]
                     if 'resume' not in word], n_gpus)


@pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)
def test_links(path):
    text = re.sub(r'^(    |```).*', '', path.read_text(), flags=re.MULTILINE)
    for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
        if not target.startswith('http'):
            assert (path.parent / target).exists(), f'{path.name}: {target}'
    # files named in backquotes: those that end like one and have a folder
    for name in re.findall(r'`((?:config|data|docs|tests|training|benchmarks)'
                           r'/[\w./]+\.(?:py|md|sh))`', text):
        assert (ROOT / name).exists(), f'{path.name}: {name}'


@functools.cache
def functions_of_the_tests() -> dict[str, set[str]]:
    return {
        file.stem: {node.name for node in ast.parse(file.read_text()).body
                    if isinstance(node, ast.FunctionDef)}
        for file in (ROOT / 'tests').glob('test_*.py')}


@pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)
def test_tests_that_are_named_exist(path):
    text = path.read_text()
    functions = functions_of_the_tests()
    everything = set().union(*functions.values())
    for name in re.findall(r'\btest_\w+', text):
        known = name in functions or name in everything or any(
            known.startswith(name) for known in everything)
        assert known, f'{path.name} names {name}'


def test_imports_go_one_way():
    """See SYSTEM_OVERVIEW.md."""
    below = {'model_config': set(), 'model_components': {'model_config'},
             'model_generation': {'model_config'},
             'model_builder': {'model_components', 'model_config',
                               'model_generation'}}
    for name, allowed in below.items():
        assert imports(ROOT / f'{name}.py') <= allowed, name
    scripts = {path.stem for path in ROOT.glob('*.py')} - set(below)
    for path in (ROOT / 'training').glob('*.py'):
        assert not imports(path) & (scripts | {'data'}), path.name
    for path in ROOT.glob('*.py'):
        assert 'train' not in imports(path), path.name


def imports(path: Path) -> set[str]:
    """Names of this project's modules at the root that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    return {name for name in names
            if name == 'data' or (ROOT / f'{name}.py').exists()}


# --- running them ----------------------------------------------------------


def copy_of_the_project(folder: Path) -> Path:
    """The files that git knows or would take up, and no others."""
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, text=True,
        capture_output=True, check=True).stdout.split('\n')
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Project:
    """A copy of the project in which the documents' commands run."""

    def __init__(self, folder, warm):
        self.folder, self.warm = copy_of_the_project(folder), warm
        self.done = set()  # a command of two documents runs once

    def run(self, command, rule=None):
        if command in self.done:
            return
        self.done.add(command)
        more = {'short': SHORT, 'dry': ['--dry_run'],
                'sample': ['--max_new_tokens=5', '--num_samples=1'],
                }.get(rule, [])
        if '$(' in command or '|' in command:
            done = subprocess.run(
                ['bash', '-euc', f'PATH={Path(sys.executable).parent}:$PATH; '
                 + command], cwd=self.folder, text=True, capture_output=True)
        else:
            done = self.start(arguments_of(command, self.folder) + [*more],
                              command.split()[0])
        assert done.returncode == 0, (
            f'$ {command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}')

    def start(self, words, program):
        if program == 'torchrun':
            return subprocess.run(
                [sys.executable, '-m', 'torch.distributed.run', *words],
                cwd=self.folder, text=True, capture_output=True)
        if words[0] == '-c':
            return subprocess.run([sys.executable, *words], cwd=self.folder,
                                  text=True, capture_output=True)
        return self.warm.run(self.folder / words[0], *words[1:],
                             cwd=self.folder)


@pytest.fixture(scope='module')
def project(tmp_path_factory, warm, qwen3_folder):
    project = Project(tmp_path_factory.mktemp('project'), warm)
    shutil.copytree(qwen3_folder, project.folder / 'qwen3_tokenizer')
    project.run('python data/python_stdlib/prepare.py')
    # what README.md's first command leaves: four runs
    for preset in 'gpt2', 'llama2', 'llama3', 'qwen3':
        project.run(f'python train.py config/quickstart.py '
                    f'--arch_preset={preset}', 'short')
    for name in 'out-a', 'out-b':
        project.run(f'python train.py config/quickstart.py --out_dir={name}',
                    'short')
    project.run('python hf_convert.py export out-quickstart my-model')
    return project


@pytest.mark.slow
@pytest.mark.parametrize('path', DOCUMENTS, ids=NAMES)
def test_commands(path, project):
    """In the order in which they stand; SYSTEM_OVERVIEW.md's have their own
    test."""
    if path.name in ('SYSTEM_OVERVIEW.md', 'RESULTS.md'):
        pytest.skip('its commands are in another test, or are measurements')
    for command in commands_of(path):
        rule = rule_of(command)
        if rule in ('run', 'short', 'dry', 'sample'):
            project.run(command, rule)


@pytest.mark.slow
def test_worked_examples(project, tmp_path):
    """Each example of SYSTEM_OVERVIEW.md, on a copy of its own."""
    text = (ROOT / 'SYSTEM_OVERVIEW.md').read_text()
    examples = re.split(r'^### ', text, flags=re.MULTILINE)[1:]
    assert len(examples) == 4
    for example in examples:
        name = example.split('\n')[0].replace(' ', '_')
        (tmp_path / name).mkdir()
        copy = Project(tmp_path / name, project.warm)
        for folder in 'data', 'qwen3_tokenizer':
            shutil.copytree(project.folder / folder, copy.folder / folder,
                            dirs_exist_ok=True)
        language, code = re.search(r'```(\w+)\n(.*?)```', example,
                                   re.DOTALL).groups()
        changed = re.findall(r'^[+][^+]|^-[^-]', code, re.MULTILINE)
        assert len(changed or code.strip().split('\n')) < 21, name
        if language == 'diff':
            subprocess.run(['git', 'apply', '-'], input=code,
                           cwd=copy.folder, text=True, check=True)
        else:
            new = copy.folder / re.search(r'`(data/\w+/)`', example)[1]
            new.mkdir()
            (new / 'prepare.py').write_text(code)
        document = tmp_path / f'{name}.md'
        document.write_text(example)
        commands = commands_of(document)
        assert commands
        for command in commands:
            copy.run(command, rule_of(command))


@pytest.mark.slow
def test_expected_performance_is_what_the_plan_says():
    """The tables of docs/performance.md and TRAINING_GUIDE.md, by config."""
    from plan import planned_setting
    from training.flops import GPUS, flops_per_token
    from training.planning import largest_batch, total_gb
    gpus = {gpu.key: gpu for gpu in GPUS}
    guide = rows_of(ROOT / 'TRAINING_GUIDE.md')[0]
    tables = rows_of(ROOT / 'docs' / 'performance.md')
    machines = [('a6000', 2, []),
                ('b200', 8, ['config/hardware_dgx_b200.py'])]
    for table, column, (key, n, overlay) in zip(
            tables, (1, 2), machines, strict=True):
        assert len(table) == len(guide) == 6
        for row, short in zip(table, guide, strict=True):
            name, parameters, gb, batch, rate, hours = row
            config, run, setting = planned_setting(
                [f'config/{name}.py', *overlay], n)
            per_second = (0.4 * n * gpus[key].bf16 * 1e12
                          / flops_per_token(config)[0])
            tokens = run['max_iters'] * run['tokens_per_iter']
            fits = largest_batch(config, setting, gpus[key].memory_gb)
            assert (gb, batch, rate, hours) == (
                f'{total_gb(config, setting):.1f}',
                f'{run["options"]["batch_size"]} ({fits})',
                f'{per_second:,.0f}', f'{tokens / per_second / 3600:.1f}')
            with torch.device('meta'):
                model = ConfigurableGPT(config)
            assert parameters == f'{model.get_num_params():,}'
            in_guide, whole = short[column].split(', ')
            assert short[0] == f'{name}, {tokens / 1e9:.2f} billion' + (
                ' tokens' if short is guide[0] else '')
            assert in_guide == gb
            assert float(whole) == pytest.approx(
                float(hours), abs=0 if '.' in whole else 0.5)


def rows_of(path: Path) -> list[list[list[str]]]:
    """The cells of each table of configurations in a document."""
    tables = re.findall(r'((?:^\| full_.*\n)+)', path.read_text(), re.MULTILINE)
    return [[[cell.strip() for cell in row.strip('| ').split('|')]
             for row in table.strip().split('\n')] for table in tables]
