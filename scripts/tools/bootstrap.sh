#!/bin/sh
# Makes sure of what pip can't bring: a new enough Python, its venv module, a C++ compiler and, for the tests, Python's headers.
# usage: bootstrap.sh PYTHON [tests]
set -eu
python=$1

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "fa4_ext's build needs Python 3.11 or newer; '$python' is not: pass another with make PYTHON=..." >&2
  exit 1
fi

missing=""
command -v c++ >/dev/null || missing="$missing g++"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ "${2:-}" = tests ]; then
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing="$missing python3-dev"
fi
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing$missing with apt-get"
  apt-get update
  # shellcheck disable=SC2086: one word a package
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
else
  echo "This build needs the packages$missing: install them, on Debian or Ubuntu with: sudo apt-get install$missing" >&2
  exit 1
fi
