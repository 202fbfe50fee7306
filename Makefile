# Each target sets up what it needs in .venv. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest

.PHONY: demo test sweeps engine mutants faults scale audit parity kernels aot bench bench-sparse lint notebooks package serve pages clean

$(VENV)/.run: pyproject.toml
	@$(call need,$(PYTHON),PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,grammar,hf,serve,tensorboard,verifiers]'
	touch $@

# With transformers, which reads what `r1` exports.
$(VENV)/.hf: pyproject.toml $(VENV)/.run
	$(BIN)/pip install --quiet --editable '.[hf]'
	touch $@

# Trains a V3-style model on the source of Python's standard library,
# reports and samples. A second call goes on from where the first ended.
demo: $(VENV)/.run
	$(BIN)/python -m experiments.pretrain --workdir=runs/demo \
	  --config=experiments/configs/v3_tiny.py

# DeepSeek-R1's pipeline in small, from text to a student in a Hugging Face
# folder; writes runs/r1/r1.html. A second call goes on from where it ended.
.PHONY: r1 r1-study
r1: $(VENV)/.hf
	$(BIN)/python -m experiments.r1 --workdir=runs/r1

# Reinforcement and self-improvement with their controls, over two seeds; hours.
# It prints how long first, and goes on from where it ended.
r1-study: $(VENV)/.run
	$(BIN)/python -m experiments.r1_study --workdir=runs/r1-study \
	  --out=benchmarks/results/r1-study

# All tests but the sweeps; two files at a time.
test: $(VENV)/.test
	$(PYTEST) -m 'not slow' -n 2 --dist loadfile \
	  --max-worker-restart=0 --durations=25

# The sweeps over layers and small models that `test` leaves out.
sweeps: $(VENV)/.test
	$(PYTEST) -m slow tests/model tests/train tests/infer tests/rl tests/posttrain \
	  tests/record tests/cli tests/presets tests/data $(wildcard tests/*_test.py) \
	  --ignore=tests/record/report_page_test.py

# Long runs of the inference engine, with the table of near-ties.
engine: $(VENV)/.test
	$(PYTEST) -m slow -s -p no:xdist tests/infer/long_test.py

# Plants every published bug in a copy: the tests must notice each of them.
mutants: $(VENV)/.test
	$(BIN)/python -m tests.mutants.run

# Kills processes, damages files, fills disks; ends with a table.
faults: $(VENV)/.test
	$(PYTEST) tests/faults -s

# Every mesh, and several processes, against one device; ends with tables.
scale: $(VENV)/.test
	$(PYTEST) tests/scale tests/parallel tests/pipeline tests/run -s

# The planner against XLA: figures, and many models on many meshes.
audit: $(VENV)/.test
	$(PYTEST) tests/plan

# Both directions of Hugging Face checkpoints against transformers.
parity: $(VENV)/.test
	$(PYTEST) tests/hf tests/parity -n 2 --dist loadfile

# The whole proof of every kernel: references, CUDA export, and the interpreter
# with its race detector, which takes a newer jax than Python 3.11 gets; there a
# whole model's logits, too.
NEWER_PYTHON ?= python3.12
need = $(1) -c '' >/dev/null 2>&1 || { echo 'error: $(1): no such\
  interpreter; give one, as in make $@ $(2)=PATH' >&2; exit 2; }
.venv-interpreter/.ready:
	@$(call need,$(NEWER_PYTHON),NEWER_PYTHON)
	$(NEWER_PYTHON) -m venv .venv-interpreter
	.venv-interpreter/bin/pip install --quiet 'jax>=0.11.2' flax absl-py pytest \
	  pytest-timeout
	touch $@
kernels: $(VENV)/.test .venv-interpreter/.ready
	$(PYTEST) tests/pallas_kernels --ignore=tests/pallas_kernels/interpreter_test.py
	.venv-interpreter/bin/python -m pytest tests/pallas_kernels/interpreter_test.py
	NPROC=8 .venv-interpreter/bin/python -m pytest tests/model/kernels_test.py \
	  -k interpreter

# The server under load: 200 clients, cut and slow streams, wrong bodies.
serve: $(VENV)/.test
	$(PYTEST) tests/serve --ignore=tests/serve/page_test.py -s

# The chat page and the reports in headless Chromium, which must be installed.
pages: $(VENV)/.test
	$(BIN)/pip install --quiet --editable '.[pages]'
	$(BIN)/python -m tests.serve.page_run

# Ahead-of-time compilation of the kernels for an H200; needs no GPU.
AOT_JAX ?= 0.11.2
.venv-aot/.ready:
	@$(call need,$(NEWER_PYTHON),NEWER_PYTHON)
	$(NEWER_PYTHON) -m venv .venv-aot
	.venv-aot/bin/pip install --quiet 'jax[cuda13]==$(AOT_JAX)' absl-py \
	  nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump
	touch $@
aot: .venv-aot/.ready
	.venv-aot/bin/python -m pallas_kernels.aot

# Kernels for TPUs compiled for v5e, v5p and v6e; needs no TPU.
.PHONY: tpu
.venv-tpu/.ready:
	@$(call need,$(NEWER_PYTHON),NEWER_PYTHON)
	$(NEWER_PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/pip install --quiet 'jax[tpu]==$(AOT_JAX)' flax absl-py pytest \
	  pytest-timeout
	touch $@
tpu: .venv-tpu/.ready
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest \
	  tests/pallas_kernels/tpu_compile_test.py

# Against transformers, in one run each; results in benchmarks/results/.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.decode

# Sparse layers against dense latent attention, 1,024 to 16,384 tokens.
bench-sparse: $(VENV)/.test
	$(BIN)/python -m benchmarks.sparse

# From Llama to V4 at equal compute: about half an hour on two quiet cores.
.PHONY: ladder
ladder: $(VENV)/.run
	$(BIN)/python -m experiments.ladder --size=half_hour --folder=runs/ladder \
	  --out=benchmarks/results/ladder

# The form of the notebooks, and each from top to bottom, small.
notebooks: $(VENV)/.test
	$(PYTEST) tests/notebooks_test.py

# The documentation, offline: links, commands and Python blocks checked.
$(VENV)/.docs: pyproject.toml $(VENV)/.run
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@
.PHONY: docs
docs: $(VENV)/.docs
	$(BIN)/python docs/tools/build_site.py

# The wheel in a bare environment of each Python that is there, used from a
# folder with an experiments/ of its own. PYTHONS='3.12' chooses.
PYTHONS ?=
package: $(VENV)/.test
	$(BIN)/python -m tests.package.run $(PYTHONS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-aot .venv-interpreter build *.egg-info
