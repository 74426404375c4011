#!/usr/bin/env bash
# What one NVIDIA GPU does with this project, in nine minutes and without a
# network; the entry goes to the head of RESULTS.md. See gpu_suite.py.
#
#   bash benchmarks/gpu_suite.sh
#   bash benchmarks/gpu_suite.sh --out results.md --minutes 20
#   bash benchmarks/gpu_suite.sh --smoke    # a CPU, tiny models, a minute
#
# PYTHON=... names another interpreter than .venv's or python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" benchmarks/gpu_suite.py "$@"
