# Every target sets up .venv from nothing and reuses it after. `demo` installs no torch; the others add what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE := $(VENV)/.core
FULL := $(VENV)/.full

.PHONY: first-minutes bench-int8 page-shots video-bench toys-bench schedules-bench faults lora-bench ladder-bench swap-bench bench-export bench-sd15 bench-sd15-request bench-sdxl bench-peers demo test test-slow lint parity bench bindings-check install-check ray-test load-bench load-bench-sd15 soak live-bench door-bench model clean

demo: $(CORE)
	$(BIN)/fewstep demo

# Two processes, a file's tests in one of them: what a file makes for its tests is made once.
test: $(FULL)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What is left out there: more of a kind that another test holds, and what takes long.
test-slow: $(FULL)
	FEWSTEP_SLOW_TESTS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow

# Hostile manifests, checkpoints, requests, pictures and connections in the numbers that a release is held to.
FAULTS := tests/export/test_manifests.py tests/export/test_hostile_configs.py tests/serving/test_hostile_requests.py \
	tests/serving/test_room.py tests/serving/test_connections.py
faults: $(FULL)
	FEWSTEP_COUNTS=full $(BIN)/python -m pytest -s $(FAULTS)

parity: $(FULL)
	FEWSTEP_PARITY=full $(BIN)/python -m pytest tests/schedules/test_parity.py -s

lint: $(FULL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p build/mypy && ln -sfn ../.. build/mypy/fewstep
	MYPYPATH=build/mypy $(BIN)/mypy

# Everything beside its peers, in one run; the figures go into bench/results.
RESULTS := bench/results
PEERS := diffusers,compile,optimum,openvino
bench: $(FULL) bench-peers
	$(BIN)/python bench/startup.py --output $(RESULTS)/startup-cpu.json
	$(BIN)/python bench/samplers.py --json $(RESULTS)/samplers-cpu.json
	$(BIN)/fewstep bench student --against $(PEERS) --also ort-openvino --steps 4,1,2,8 --repeat 40 \
		--output $(RESULTS)/embedded-cpu.json --plot build/bench/embedded-cpu.png
	$(BIN)/python bench/floor.py student --runs 200 --output $(RESULTS)/embedded-floor-cpu.json

# SD 1.5's size with random weights: an evaluation of the UNet, and whole requests. They need 20 GB of memory and 15 of disk.
# optimum is left out, because its exporter takes more than that (bench/results/export-cpu.json).
SD15 := build/bench/sd15
SD15_PEERS := diffusers,compile,openvino
SD15_BENCH := $(BIN)/fewstep bench $(SD15)/bundle --checkpoint $(SD15)/model --size 512x512 --guidance 0 \
	--against $(SD15_PEERS) --peers-at-once 1 --warm-up 1 --lead-in 0
bench-sd15: $(FULL) $(SD15)/.built
	$(SD15_BENCH) --unet --backend ort-openvino --also ort-openvino-bf16 --precision float32,bfloat16 --repeat 5 \
		--output $(RESULTS)/sd15-unet-cpu.json
	$(BIN)/python bench/floor.py $(SD15)/bundle --components unet --size 512x512 --runs 3 \
		--output $(RESULTS)/sd15-floor-cpu.json

# Integers beside NNCF's and optimum-intel's own, after our search (half an hour; it goes on where it was stopped).
INT8 := $(BIN)/fewstep bench $(SD15)/bundle --checkpoint $(SD15)/model --guidance 0 --budget 30dB \
	--peers-at-once 1 --warm-up 1 --lead-in 0
bench-int8: $(FULL) $(SD15)/.lowered
	$(INT8) --size 512x512 --unet --backend ort-openvino --against diffusers,nncf,optimum-intel --repeat 5 \
		--output $(RESULTS)/sd15-int8-cpu.json
	$(INT8) --size 512x512 --unet --backend ort-cpu --also ort-openvino-bf16 --against diffusers --repeat 5 \
		--output $(RESULTS)/sd15-int8-others-cpu.json
	$(INT8) --size 256x256 --steps 4 --backend ort-openvino --against diffusers,nncf,optimum-intel --repeat 3 --cold 0 \
		--output $(RESULTS)/sd15-int8-request-cpu.json

$(SD15)/.lowered: $(SD15)/bundle/bundle.json | bench-peers
	$(BIN)/fewstep quantize $(SD15)/bundle --budget 30dB --by block --pairs 2 --choose 4 --held-out 8 \
		--size 128x128 --steps 4 --guidance 0
	@touch $@

bench-sd15-request: $(FULL) $(SD15)/.built
	$(SD15_BENCH) --backend ort-openvino --steps 4 --repeat 2 --cold 0 --output $(RESULTS)/sd15-request-cpu.json
	$(SD15_BENCH) --backend ort-cpu --steps 4 --repeat 2 --cold 0 --output $(RESULTS)/sd15-request-ort-cpu.json

$(SD15)/.built: $(SD15)/bundle/bundle.json | bench-peers
	$(BIN)/fewstep build $(SD15)/bundle --backend ort-cpu
	build/bench/fewstep-openvino/bin/fewstep build $(SD15)/bundle --backend ort-openvino
	build/bench/fewstep-openvino/bin/fewstep build $(SD15)/bundle --backend ort-openvino-bf16
	@touch $@

$(SD15)/model/model_index.json: | $(FULL)
	rm -rf $(SD15)/model
	$(BIN)/python tools/random_checkpoint.py sd1 $(SD15)/model

$(SD15)/bundle/bundle.json: $(SD15)/model/model_index.json
	$(BIN)/fewstep export $(SD15)/model $(SD15)/bundle --quick-gate --overwrite

$(SD15)/controlnet/config.json: $(SD15)/model/model_index.json
	$(BIN)/python tools/random_controlnet.py $(SD15)/model $(SD15)/controlnet

$(SD15)/controlled/bundle.json: $(SD15)/controlnet/config.json
	$(BIN)/fewstep export $(SD15)/model $(SD15)/controlled --controlnet canny=$(SD15)/controlnet --quick-gate --overwrite

# SDXL's size: one evaluation of its UNet, in bfloat16, because float32 and its copies take more than 24 GB. 22 GB of disk.
SDXL := build/bench/sdxl
bench-sdxl: $(FULL) $(SDXL)/bundle/bundle.json | bench-peers
	$(BIN)/fewstep bench $(SDXL)/bundle --checkpoint $(SDXL)/model --size 1024x1024 --guidance 0 --unet \
		--backend ort-openvino-bf16 --against diffusers --precision bfloat16 --warm-up 1 --lead-in 0 --repeat 3 \
		--output $(RESULTS)/sdxl-unet-cpu.json

$(SDXL)/model/model_index.json: | $(FULL)
	rm -rf $(SDXL)/model
	$(BIN)/python tools/random_checkpoint.py sdxl $(SDXL)/model --dtype float16

$(SDXL)/bundle/bundle.json: $(SDXL)/model/model_index.json
	$(BIN)/fewstep export $(SDXL)/model $(SDXL)/bundle --dtype fp32 --no-gate --overwrite

# Full-size checkpoints of random weights through our exporter and optimum's: half an hour, and 30 GB of disk.
bench-export: $(FULL) build/bench/optimum/.ready
	$(BIN)/python bench/export.py --output $(RESULTS)/export-cpu.json

# A video model of full size with random weights: export, an engine of TensorRT-RTX, one evaluation. No GPU; 25 GB of disk.
video-bench: $(FULL)
	$(PIP) --editable '.[tensorrt-rtx]'
	$(BIN)/python bench/video.py --output $(RESULTS)/video-cpu.json

# One virtual environment a peer, because their pins conflict.
bench-peers: $(patsubst bench/peers/%.txt,build/bench/%/.ready,$(wildcard bench/peers/*.txt))

build/bench/%/.ready: bench/peers/%.txt
	test -x build/bench/$*/bin/python || $(PYTHON) -m venv build/bench/$*
	build/bench/$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	# torchvision's wheel wants the torch that has CUDA; nothing here needs it
	build/bench/$*/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

# The oldest and newest TensorRT whose calls are checked; their wheels hold the bindings alone, 1 MB each.
bindings-check: $(FULL)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu13-bindings==11.4.0.106
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu12-bindings==10.16.1.11
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest build/bindings tensorrt-cu12-bindings==10.12.0.36
	FEWSTEP_SLOW_TESTS=1 $(BIN)/python -m pytest tests/engines/test_bindings.py

# Two replicas on Ray Serve, one of which is killed. Ray is large (80 MB) and slow to start (20 s), so it has a target of its own.
ray-test: $(FULL)
	$(PIP) --editable '.[serve,ray]'
	FEWSTEP_RAY=1 $(BIN)/python -m pytest tests/serving/test_ray.py

# Figures of serving, on a machine that does nothing else meanwhile: seven minutes; a quarter of an hour; two; two.
load-bench: $(FULL)
	$(BIN)/python bench/load.py --json $(RESULTS)/load-cpu.json --plot $(RESULTS)/load-cpu.png

load-bench-sd15: $(FULL) $(SD15)/bundle/bundle.json
	$(BIN)/python bench/load.py --bundle $(SD15)/bundle --name "SD 1.5's size, random weights" --sizes 256x256 \
		--steps 1,2,4 --guided 0 --threads $$(nproc) --rows 4 --timings 3 --repeats 3 --long 12 --seconds 100 \
		--rates 0.4,0.8,1.2 --without "static batches" --json $(RESULTS)/load-sd15-cpu.json

lora-bench: $(FULL) $(SD15)/bundle/bundle.json
	$(BIN)/python bench/loras.py $(SD15)/bundle $(SD15)/model --rounds 5 --json $(RESULTS)/loras-sd15-cpu.json

# DeepFloyd-IF's second stage at full size: its export, TensorRT-RTX's build, one step on the CPU.
deepfloyd-bench: $(FULL)
	$(BIN)/python bench/deepfloyd.py --stages if-ii --build --evaluate --output $(RESULTS)/deepfloyd-cpu.json

swap-bench: $(FULL) $(SD15)/bundle/bundle.json
	$(BIN)/python bench/swap.py $(SD15)/bundle $(SD15)/model --json $(RESULTS)/swap-sd15-cpu.json

ladder-bench: $(FULL) $(SD15)/bundle/bundle.json $(SD15)/controlled/bundle.json
	$(BIN)/python bench/ladder.py $(SD15)/bundle $(SD15)/controlled $(SD15)/model $(SD15)/controlnet \
		--json $(RESULTS)/ladder-sd15-cpu.json

# What schedules found by Align Your Steps' bound gain where the data are known exactly: four minutes on one core.
toys-bench: $(FULL)
	OMP_NUM_THREADS=1 $(BIN)/python bench/schedule_toys.py --json $(RESULTS)/schedule-toys.json --plot docs/schedule-toys.png

# Schedules for the embedded base model, an hour on two quiet cores; docs/schedules.md says what comes of it.
schedules-bench: $(FULL)
	for sampler in dpmpp_2m euler unipc; do \
	  $(BIN)/fewstep schedule search base --sampler $$sampler --steps 4,5,6,8,10 --prompts examples/shapes.txt --budget 20m \
	    --output $(RESULTS)/schedules-base-$$sampler.json || exit 1; \
	done
	$(BIN)/python tools/demo_model/searched.py $(RESULTS)/schedules-base-dpmpp_2m.json --sheet docs/schedules-5-steps.png \
	  --output $(RESULTS)/schedules-base-accuracy.json

soak: $(FULL)
	$(BIN)/python bench/soak.py --json $(RESULTS)/soak-cpu.json

# In the browser, against a server of its own: needs Debian's chromium and chromium-driver.
door-bench: $(FULL)
	$(BIN)/python bench/door.py --output $(RESULTS)/door-cpu.json

# The live page's pictures in docs/, taken in the browser: look at them after.
page-shots: $(FULL)
	$(BIN)/python tools/page_shots.py --output docs

live-bench: $(FULL)
	$(BIN)/python bench/live.py --output $(RESULTS)/live-cpu.json

# What somebody new does first, one after another, with what each step showed.
first-minutes: $(FULL)
	$(BIN)/python tools/first_minutes.py

install-check: $(FULL)
	$(BIN)/python tools/check_install.py

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'fewstep needs Python 3.11 or later: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cpu]'
	@touch $@

# torch first and by its exact version: a range could pull a build with gigabytes of CUDA libraries.
$(FULL): $(CORE)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cpu,serve,export,video,verify,tensorrt-rtx,plot,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
