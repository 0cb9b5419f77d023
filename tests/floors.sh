#!/usr/bin/env bash
# Runs the command lines and the plain tests on the lowest versions that pyproject.toml admits, then on the newest Python:
#   bash tests/floors.sh PYTHON3.10 PYTHON3.13 [FOLDER]
# It downloads several gigabytes into FOLDER (default: a temporary one), so it is run by hand; tests/README.md has the result.
set -euo pipefail
lowest=$1 newest=$2 folder=${3:-$(mktemp -d)}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$folder" && cd "$folder" && pwd)

# "torch>=2.6" -> "torch==2.6.*": the first release of the lowest series of each package
floors() {
    "$1" - "$root/pyproject.toml" <<'PYTHON'
import re, sys
text = open(sys.argv[1]).read()
block = re.search(r"^dependencies = \[(.*?)\]", text, re.M | re.S)[1]
for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', block):
    print(f"{name}=={version}" if version.count(".") == 2 else f"{name}=={version}.*")
PYTHON
}

check() {  # a name, and the Python of a virtual environment that has everything but minimti
    echo "== $1: $("$2" --version), torch $("$2" -c 'import torch; print(torch.__version__)')"
    local work="$folder/$1-work"
    rm -rf "$work" && mkdir "$work" && cd "$work"
    "$2" "$root/train.py" "$root/examples/dive.mp4" --model tiny --steps 2 --cache 2 --out m.pt
    "$2" "$root/sample.py" --emb m.pt "$root/examples/rocket.png" --steps 2
    "$2" "$root/train.py" "$root/examples/dive.mp4" --model tiny --recipe paper --steps 2 --cache 0 --out n.safetensors
    "$2" "$root/sample.py" --emb n.safetensors "$root/examples/rocket.png" --steps 2
    cd "$root" && "$2" -m pytest -q -p no:cacheprovider
}

[ -x "$folder/lowest/bin/python" ] || { "$lowest" -m venv "$folder/lowest" && floors "$lowest" | xargs "$folder/lowest/bin/pip" install -q pytest pytest-xdist hypothesis "setuptools>=77" wheel; }
[ -x "$folder/newest/bin/python" ] || { "$newest" -m venv "$folder/newest" && floors "$newest" | sed 's/==.*//' | xargs "$folder/newest/bin/pip" install -q pytest pytest-xdist hypothesis "setuptools>=77" wheel; }
check lowest "$folder/lowest/bin/python"
check newest "$folder/newest/bin/python"
