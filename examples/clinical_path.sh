#!/bin/sh
# From 20 scans, 3 of them labeled, to a student in a bundle, in four commands.
#
#   sh examples/clinical_path.sh [FOLDER]      from the repository's root; FOLDER is new or empty, default: clinical_path
#
# The scans are synthetic left atria, small enough for a CPU. For your own scans, skip the first command and write a data
# list (docs/source/own_data.md). On a GPU, SIZES=" " selects the published sizes and SAM.
set -e
FOLDER=${1:-clinical_path}
BUNDLE=${BUNDLE:-bundles/knowsam_la}
PYTHON=${PYTHON:-python}
SIZES=${SIZES:-"--image_size [32,32,32] --spacing [2.0,2.0,2.0] --sam_variant stand_in --sam_image_size 64 --max_iterations 200
  --channels [8,16,32,64,128] --aggregation_channels [4,4,8] --window_overlap 0.5 --labeled_batch_size 2
  --unlabeled_batch_size 2 --num_workers 0"}

# 1. 20 scans and their data list: 2 labeled for training, 1 labeled to choose the best student, 17 unlabeled
$PYTHON -m knowsam_monai phantom "$FOLDER/scans" --anatomy left_atrium --labeled 2 --validation 1 --unlabeled 17 --test 0

# 2. check the data list
$PYTHON -m knowsam_monai check "$FOLDER/scans/dataset.json" --bundle "$BUNDLE"

# 3. train; the student is saved into the bundle, and "$FOLDER/run/report.html" reports the run
$PYTHON -m monai.bundle run --config_file "$BUNDLE/configs/train.json" --bundle_root "$BUNDLE" \
    --dataset_dir "$FOLDER/scans/dataset.json" --output_dir "$FOLDER/run" $SIZES

# 4. segment all scans with it
$PYTHON -m knowsam_monai predict "$FOLDER/scans" --image_pattern '*/*_LGE.nii.gz' --bundle "$BUNDLE" --run "$FOLDER/run" \
    --output "$FOLDER/segmentations"
