#!/usr/bin/env bash
# Installs the checkout that this file is part of on a node of a Ray cluster: a virtual environment with the pinned
# packages in ~/tandem-venv. May be run again, after a change of either.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=~/tandem-venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Tandem needs Python 3.11 or newer; this is $(python3 --version)." >&2; exit 2; }
test -x "$venv/bin/python" || python3 -m venv "$venv"

# As in the Makefile: torch first and alone, because its index decides between the CPU and the CUDA build.
"$venv/bin/pip" install --quiet --disable-pip-version-check "$(sed -n 's/^TORCH := //p' Makefile)"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e .
"$venv/bin/python" -m kernels.cpu.library

# This node's labels, for `ray start`: docs/ray.md.
test -e ~/ray-labels.yaml || echo '{}' > ~/ray-labels.yaml
touch ~/.bashrc
line=". $PWD/deploy/ray/node.sh"
grep -qxF "$line" ~/.bashrc || echo "$line" >> ~/.bashrc
