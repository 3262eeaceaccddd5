# Each target creates the virtual environment that it needs, with PYTHON. Options of pytest: make test T="-k name"
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUTPUT ?= output/digits

.PHONY: demo test lint minkowski

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	$(BIN)/pip install --quiet pytest pytest-xdist ruff safetensors matplotlib \
	    peft torch-pruning fvcore thop torchao pyarrow tifffile webdataset datasets "setuptools>=77" transformers \
	    segmentation_models_pytorch onnx onnxruntime onnxscript pycocotools scikit-image
	touch $@

PRETRAIN = $(BIN)/python main_pretrain.py @recipes/demo_digits.args --output_dir $(OUTPUT)
FINETUNE = $(BIN)/python main_finetune.py @recipes/demo_digits_finetune.args
TRAIN = $(FINETUNE) --finetune $(OUTPUT)/checkpoint-7.pth --output_dir $(OUTPUT)_finetuned
EVALUATE = $(FINETUNE) --eval true --output_dir $(OUTPUT)_finetuned

demo: $(VENV)/ready
	$(PRETRAIN)
	$(TRAIN)
	$(EVALUATE)
	@echo
	@echo "pre-training:    $(PRETRAIN)"
	@echo "fine-tuning:     $(TRAIN)"
	@echo "evaluation:      $(EVALUATE)"
	@echo "pictures:        $(OUTPUT)/reconstruction-0007.png, $(OUTPUT)_finetuned/confusion.png"
	@echo "logs:            $(OUTPUT)/log.txt, $(OUTPUT)_finetuned/log.txt, or $(BIN)/tensorboard --logdir output"
	@echo "on your images:  $(BIN)/python main_pretrain.py --data_path YOUR_IMAGES --model convnextv2_atto --output_dir output/mine"

# Three processes for two cores: some tests wait for others' processes, such as Slurm's.
test: $(VENV)/ready-to-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 3 --dist loadfile --no-loadscope-reorder \
	    -o tmp_path_retention_policy=failed $(T)

lint: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# MinkowskiEngine 0.5.4 for `--sparse_backend minkowski` and its tests: Python 3.11 at most, and libopenblas-dev.
minkowski: $(VENV)/ready
	$(BIN)/pip install --quiet setuptools wheel ninja
	PATH="$(abspath $(BIN)):$$PATH" SETUPTOOLS_USE_DISTUTILS=stdlib MAX_JOBS=2 \
	    $(BIN)/pip install --no-build-isolation --no-deps MinkowskiEngine==0.5.4
