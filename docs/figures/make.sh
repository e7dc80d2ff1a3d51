#!/bin/sh
# Makes the figures of docs/figures.md again by running its commands. Give a folder for the store; minutes the first time.
set -eu
PRUNESWEEP_STORE=$(realpath "${1:?give a folder for the store}")
export PRUNESWEEP_STORE
cd "$(dirname "$0")"
sed -n '/^```bash$/,/^```$/p' ../figures.md | grep -v '^```' | sh -eu
