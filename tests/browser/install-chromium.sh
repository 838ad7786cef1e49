#!/usr/bin/env bash
# Installs Debian's package `chromium`, which the tests of the search page run in. Needs root (or sudo without a
# password); where it can't be installed it says so, and these tests are skipped.
set -uo pipefail

if command -v chromium >/dev/null; then
    exit 0
fi
become=$([ "$(id -u)" = 0 ] || echo "sudo --non-interactive")
echo "The browser tests need Chromium: installing Debian's package chromium"
export DEBIAN_FRONTEND=noninteractive
if ! { $become apt-get update -qq && $become apt-get install -qq --yes --no-install-recommends chromium; } >/dev/null; then
    echo "chromium could not be installed: the tests of the search page are skipped; as root: apt-get install chromium" >&2
fi
