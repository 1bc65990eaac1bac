# Sourced by quickstart.sh and test.sh, in the repository root.

# Installs $1 (`.` or `.[test]`) into .venv, making that first if need be; says nothing on a later, unchanged call.
install_into_venv() {
    if [ ! -x .venv/bin/pip ]; then # comes last: where ensurepip is missing, as on a bare Debian, only python is there
        python=$(command -v python3 || command -v python) || {
            echo "no python3 on PATH; install Python 3.11 or newer" >&2
            return 1
        }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "$("$python" --version) is too old; install Python 3.11 or newer" >&2
            return 1
        }
        "$python" -m venv .venv
    fi
    stamp=.venv/installed-$(echo "$1" | tr -dc 'a-z')
    if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
        echo "installing xformer-train and its dependencies into .venv (a minute or two, once)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e "$1"
        touch "$stamp"
    fi
}
