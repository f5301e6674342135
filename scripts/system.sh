#!/bin/sh
# system.sh PACKAGE WHY...: installs a Debian package where that is ours to do (root, CI=true), and
# otherwise says what is missing and how to get it. Fails if the package is not there afterwards.
set -eu
package=$1
shift
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "system: $*: installing $package"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$package"
    exit
fi
echo "system: $*: install $package (Debian, as root: apt-get install $package)" >&2
exit 1
