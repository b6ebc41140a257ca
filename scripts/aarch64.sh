#!/bin/sh
# Run the stress of the heat ring as aarch64 code, on x86-64 under qemu's user-mode emulation.
#
#     scripts/aarch64.sh [RECORDS]
#
# Needs Debian's apt-get and dpkg-deb, and .venv (`make .venv/.ready`). Everything goes to
# build/aarch64 (about 500 MB), once; neither root nor any change of the system is needed. The
# emulator turns aarch64's barriers into the host's and reorders no more than the host does, so this
# tests the compiled code and not the weak order; tests/ipc/test_aarch64.py looks at the orderings.
set -eu

records=${1:-1000000}
top=$(cd "$(dirname "$0")/.." && pwd)
python=$top/.venv/bin/python
here=$top/build/aarch64

if [ "$(uname -m)" = aarch64 ]; then
    exec "$python" "$top/tests/ipc/ring_stress.py" "$records"
fi

# apt with lists, cache and (empty) status of its own; the system's hooks are left out
private_apt() {
    mkdir -p apt/lists/partial apt/cache/archives/partial apt/parts
    : >apt/status
    ln -sf /etc/apt/apt.conf.d/* apt/parts/
    echo '#clear APT::Update; #clear DPkg;' >apt/parts/zz-no-hooks
    cat >apt/apt.conf <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; "amd64"; };
APT::Sandbox::User "";
Dir::State "$here/apt";
Dir::State::status "$here/apt/status";
Dir::Cache "$here/apt/cache";
Dir::Etc::Parts "$here/apt/parts";
END
    export APT_CONFIG=$here/apt/apt.conf
}

set_up() {
    private_apt
    echo "fetching qemu and aarch64 Python (Debian)"
    apt-get -qq update
    apt-get -qq -y --no-install-recommends --download-only install python3 libstdc++6
    (cd apt && apt-get -qq download qemu-user-static:amd64)
    for package in apt/cache/archives/*.deb; do
        dpkg-deb -x "$package" root
    done
    dpkg-deb --fsys-tarfile apt/qemu-user-static_*.deb | tar -x ./usr/bin/qemu-aarch64-static

    version=$(basename "$(readlink root/usr/bin/python3)")
    echo "fetching aarch64 wheels for $version"
    grep -E '^(numpy|numba|llvmlite|msgspec|posix_ipc)==' "$top/requirements-dev.txt" >wheels.txt
    "$python" -m pip --disable-pip-version-check -qq download --no-deps --only-binary :all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 --python-version "${version#python}" \
        --dest wheels -r wheels.txt
    for wheel in wheels/*.whl; do
        "$python" -m zipfile -e "$wheel" path
    done
    ln -sfn "$top" path/flash_eplb
    touch ready
}

mkdir -p "$here"
cd "$here"
test -e ready || set_up

# A kernel in numba's cache may be older than the intrinsics that it was compiled with.
rm -rf numba
export NUMBA_CACHE_DIR="$here/numba" PYTHONPYCACHEPREFIX="$here/pyc" PYTHONPATH="$here/path"
emulated() { usr/bin/qemu-aarch64-static -L root root/usr/bin/python3 "$@"; }
emulated -c 'import platform; print("running on", platform.machine(), platform.python_version())'
emulated "$top/tests/ipc/ring_stress.py" "$records"
