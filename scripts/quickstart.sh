#!/usr/bin/env bash
# The main job on a small scale, on a CPU in a few minutes: photographs -> LMDB -> SPAN -> DSCLoRA under a teacher ->
# merged SPAN -> test -> a table and a picture. Everything is written to quickstart/.
set -euo pipefail
trains=yes
source "$(dirname "$0")/environment.sh"
options=$PWD/options/quickstart
photos=$PWD/scripts/quickstart_photos.py

mkdir -p quickstart
cd quickstart
rm -rf photos datasets experiments results DSCLoRA_merged.pth comparison.png # of an earlier quickstart

step() { printf '\n== %s\n' "$*"; }

step "Photographs that come with scikit-image"
python "$photos" photos

step "Prepare: images -> LMDB"
lora-sr prepare photos/train -o datasets/train --scale 2 --size 128 --step 64 # small sub-images are quick to read
lora-sr prepare photos/test -o datasets/test --scale 2 --size 0

step "Train a small SPAN"
python -m lora_sr.train -opt "$options/train_SPAN.yml"

step "Fine-tune it with DSCLoRA under a teacher"
python -m lora_sr.train -opt "$options/train_DSCLoRA.yml"

step "Merge: DSCLoRA -> SPAN"
lora-sr merge experiments/DSCLoRA/models/net_g_latest.pth -o DSCLoRA_merged.pth

step "Test the merged network on the photographs that were held out"
python -m lora_sr.test -opt "$options/test_SPAN.yml"

step "Compare"
lora-sr compare --set photographs=photos/test --picture comparison.png \
  SPAN=experiments/SPAN/models/net_g_latest.pth "DSCLoRA merged=DSCLoRA_merged.pth"
echo "all of it is in $PWD"
