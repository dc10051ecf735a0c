# From raw competition files to a checked, scored submission. `make help` lists the targets.
#
# Each target is one verb of the program `rna` (pipeline/cli/), which decides by hash whether there is work to do:
# running a target twice is safe. make itself exits with 2 whatever a verb's exit code; the verb prints its own.

COMP  ?= ribonanza#        competition: ribonanza, openvaccine, rna3d, rna3d2 (part 2), or a set of your own: labelled-<name>, profiles-<name>
RAW   ?=#                  folder or zip with the competition's files, or the training file of a set of your own; empty = where download puts them
FILES ?=#                  names on Kaggle that download fetches; empty = what data reads, all = everything
MODEL ?=#                  a config in pipeline/configs, or a path to a TOML file; empty = ribonanza_mamba, for rna3d small_structure, for sets of your own a small one; predict and embed: also a run's folder, or reactivity-v2, weights that come along
SPLIT ?= sim80_k5#         <kind><identity %>_k<folds>: sim80_k5, length_k5, random_k5
FOLD  ?= 0#                fold to hold out, from 0
NAME   = all#              name of an ensemble; unlike the others it is not taken from the environment
RUNS  ?=#                  runs to ensemble; empty = every finished run of SPLIT
RUN   ?=#                  for evaluate and report: a single run, <model> or <model>.<split>, instead of the ensemble NAME
SET   ?=#                  overrides: SET="train.lr=1e-3 train.epochs=5" TAG=fast
TAG   ?=#                  names a variant of MODEL
OVER  ?=#                  what a sweep varies: OVER="train.lr=[1e-3,2e-3] train.batch_size=[32,64]"
SEEDS ?= 3#                runs of each cell of a sweep
TRIALS ?=#                 cells that Optuna proposes; empty = every combination
NPROC ?= 1#                processes that train together, one for each GPU
BUDGET ?=#                 time for training and predictions, such as 8h, with what the same command does before; empty = as long as it takes
TRACK ?=#                  who else listens: tensorboard, wandb (offline)
FILE  ?=#                  sequences of your own for make predict, structures and embed; embeddings for features; submission for check and submit-kaggle
FEATURES ?=#               of the sequences in FILE, for networks that read some: name=<folder or parquet>, spaces between several
SEQ   ?=#                  a single sequence of your own, for make predict and structures
TRACES ?=#                 folder of C1' traces for score-tm and bench-tm: models, model_traces, native_traces.parquet
OUT   ?= scores.parquet#   what score-tm writes
ENGINE ?=#                 of TM-scores: usalign for the program, auto: it where installed; empty = built-in
OWNER ?=#                  your user name on Kaggle, for make kernel
KERNEL ?=#                 make kernel: train (as when empty) or predict; make submit-kaggle: owner/slug of a notebook
VERSION ?=#                of the notebook whose output make submit-kaggle KERNEL=owner/slug submits
SLUG  ?=#                  which bundle of make kernel is meant, where there are several
FORMAT ?= csv#             of the submission: csv or parquet
ARTIFACTS ?= artifacts#    where the stages write; another folder gets the submissions too
EXTRAS ?= dev#             extras of pyproject.toml to install
PYTHON ?= python3#         the interpreter that builds .venv
PY    ?= .venv/bin/python# PY=python3 uses an environment of your own and installs nothing

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# stages read what those before them wrote: make -j, or MAKEFLAGS=-j8 for all makes, began them at once
.NOTPARALLEL:
.DEFAULT_GOAL := help

# sequences of your own are predicted with every fold, unless one is said, and with an ensemble only where one is
ONE_FOLD := $(if $(filter command environment,$(firstword $(origin FOLD))),--fold "$(strip $(FOLD))")
ONE_NAME := $(if $(filter command,$(firstword $(origin NAME))),--name "$(strip $(NAME))")
# what this command says itself: of make within make the other one's variables are among its own
OUTER := $(foreach word,$(shell echo "$${MAKEFLAGS-}"),$(firstword $(subst =, ,$(word))))
GIVEN := $(filter-out $(OUTER),$(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))
# spaces around a value are no part of it
STRIPPED := COMP MODEL SPLIT FOLD NAME TAG RUN SEEDS TRIALS NPROC BUDGET SEQ OUT ENGINE OWNER KERNEL VERSION SLUG FORMAT \
  MSA STEP LIMIT WAIT RESUME PYTHON PY EXTRAS
$(foreach name,$(STRIPPED),$(eval override $(name) := $$(strip $$($(name)))))
# what is asked for by 1 is not asked for by 0
FLAGS := ALL ALLOW_CHANGES FOLLOW JSON KAGGLE NUCLEOTIDES PARTIAL RELOCK RESTART
$(foreach name,$(FLAGS),$(if $(filter 0 no false,$($(name))),$(eval override $(name) :=)))
# a path as a recipe's double quotes hold it
path = $(subst `,\`,$(subst ",\",$(subst $$,\$$,$(subst \,\\,$(if $(word 2,$(1)),$(1),$(strip $(1)))))))
override ARTIFACTS := $(or $(call path,$(ARTIFACTS)),artifacts)
override RAW := $(call path,$(RAW))
override FILE := $(call path,$(FILE))

# a variable in small letters is another one, and would be left out without a word; so would a mistyped one be
SMALL := $(foreach name,$(GIVEN),$(if $(filter-out $(name),$(shell echo '$(name)' | tr a-z A-Z)),$(name)))
ifneq ($(strip $(SMALL)),)
$(error $(strip $(SMALL)): variables are in capitals. Next: $(foreach name,$(SMALL),$(shell echo '$(name)' | tr a-z A-Z)=$($(name))))
endif
# a hint after mistyped words: $(call alike,<words>,<those that there are>)
alike = $(foreach word,$(1),$(shell $(PYTHON) -c 'import difflib, sys; print(*[f"(did you mean {near}?)" for near in difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1)])' $(word) $(2) 2>/dev/null))
# a name with a _ may be some program's, such as OMP_NUM_THREADS; compilers go by two names without
KNOWN := $(shell grep -ohE '[A-Z_]+ *\??=' $(MAKEFILE_LIST) | tr -d ' ?=')
UNKNOWN := $(sort $(foreach name,$(filter-out SHELL MAKE MAKEFLAGS CC CXX $(KNOWN),$(GIVEN)),$(if $(findstring _,$(name)),,$(name))))
ifneq ($(UNKNOWN),)
$(error $(UNKNOWN): $(strip no target reads that $(call alike,$(UNKNOWN),$(KNOWN))). Next: make help lists the variables; one of the environment goes before make)
endif
ifneq ($(and $(filter MODEL,$(GIVEN)),$(MODEL),$(MAKECMDGOALS),$(if $(filter-out ensemble submit submit-kaggle evaluate report $(if $(FILE)$(SEQ),,structures),$(MAKECMDGOALS)),,by name)),)
$(error MODEL=$(MODEL): what is blended, scored, shown or sent goes by name. Next: RUN=<run> for evaluate and report, RUNS="<run> <run>" for ensemble, FILE=<your RNAs> for structures by one run; make status lists the runs)
endif
ifneq ($(and $(filter FEATURES,$(GIVEN)),$(FEATURES),$(if $(FILE)$(SEQ),,alone)),)
$(error FEATURES says what comes with sequences of your own. Next: FILE=<sequences> with it; data.features in SET for training)
endif
# how many folds, and in how many processes, is not left out without a word: $(call unread,VARIABLE,<target>,<others that read it>)
unread = $(and $(filter $(1),$(GIVEN)),$($(1)),$(filter $(2),$(MAKECMDGOALS)),$(if $(filter $(3),$(MAKECMDGOALS)),,unread))
ifneq ($(call unread,ALL,train,train-bg logs stop sweep kernel),)
$(error ALL: make train trains one fold. Next: make train-all)
endif
ifneq ($(call unread,FOLD,train-all,train train-bg logs stop sweep replay predict embed kernel),)
$(error FOLD=$(FOLD): make train-all trains every fold. Next: make train FOLD=$(FOLD))
endif
ifneq ($(and $(call unread,NPROC,sweep,train train-all train-bg plan),$(filter-out 1,$(NPROC))),)
$(error NPROC=$(NPROC): a sweep trains one run at a time, in one process. Next: start it once for each GPU, with CUDA_VISIBLE_DEVICES=<its number> before make)
endif
ifneq ($(and $(strip $(SET)),$(if $(TAG)$(ALLOW_CHANGES)$(filter plan sweep,$(MAKECMDGOALS)),,untagged)),)
$(error SET changes what a run is, so name the variant: add TAG=some-name)
endif

# a sentence that ends with a command of make repeats an interpreter of one's own
RNA := $(if $(filter-out .venv/bin/python,$(PY)),env RNA_PY=$(PY)) $(PY) -m pipeline
GPU := models/test_kernels models/test_causal_conv models/test_sepconv models/test_ssd models/test_long_conv pipeline/test_plan pipeline/test_muon \
  models/test_triton_scan pipeline/test_training_gpu models/test_contract models/test_compile
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
named = \( -name bench $(patsubst %,-o -name '%',$(1)) \)
OWN := demo kernel-check wheels
competitions = $(shell sed -n 's/.*[^a-z_]name="\([a-z0-9]*\)".*/\1/p' $(dir $(firstword $(MAKEFILE_LIST)))pipeline/competitions/*.py) labelled-* profiles-*
AT := --comp "$(COMP)" --artifacts "$(ARTIFACTS)"
# an option whose variable is given: $(call given,--tag,TAG)
given = $(if $($(2)),$(1) $($(2)))
ELSEWHERE := $(if $(filter-out artifacts,$(ARTIFACTS)), ARTIFACTS='$(ARTIFACTS)')
CONFIG := $(if $(MODEL),--model "$(MODEL)")
SETTINGS := $(foreach item,$(SET),--set '$(item)')
NAMED := $(CONFIG) --split "$(SPLIT)" $(call given,--tag,TAG)
VARIANT := $(NAMED) $(SETTINGS)
SCORED := --split "$(SPLIT)" --name "$(NAME)" $(call given,--run,RUN)
SUBMISSION := --name "$(NAME)" --format $(FORMAT)
OWN_FILE := $(strip $(if $(FILE),"$(FILE)") $(if $(SEQ),--sequence "$(SEQ)"))
OWN_FEATURES := $(foreach item,$(FEATURES),--features '$(item)')
BUNDLE := $(call given,--slug,SLUG)
JOB := $(if $(ALL),--all-folds,--fold "$(FOLD)")
TRAIN := $(if $(RESTART),--restart) $(if $(ALLOW_CHANGES),--allow-changes) $(call given,--time-budget,BUDGET) \
  $(foreach tracker,$(TRACK),--track $(tracker)) $(if $(filter-out 1,$(NPROC)),--nproc $(NPROC))
MSA_OF := $(if $(MSA),--msa "$(MSA)")
WITHOUT_NETWORK := --without-network $(MSA_OF)
ENVIRONMENT := $(if $(filter .venv/bin/python,$(PY)),.venv/.ready)

.PHONY: help setup doctor demo test test-floor test-faults test-gpu lint download data bpp features templates folds audit train train-all train-bg status logs stop sweep \
        replay predict embed templates-predict denovo words structures ensemble submit submit-kaggle \
        kernel kernel-push kernel-status kernel-pull kernel-check handover check evaluate score-tm report plan bench bench-data bench-folds bench-loader bench-kernels bench-models bench-structures bench-tm clean

# Targets and variables in two columns within 100 characters, longer texts on lines of their own below.
define HELP
function show(head, text,    words, count, k, line) {
  count = split(text, words, " "); line = head
  for (k = 1; k <= count; k++) {
    if (length(line) + length(words[k]) >= 100) { print line; line = sprintf("%" length(head) "s", "") }
    line = line " " words[k]
  }
  print line
}
/^$$/ { gap = "\n" }
/^[a-z-]+:.*## / {
  name = text = $$0; sub(/:.*/, "", name); sub(/.*## /, "", text)
  if (shown++) printf "%s", gap
  gap = ""; show(sprintf("%-18s", name), text)
}
/^[A-Z]+ +\??=/ {
  name = preset = text = $$0; sub(/ *\??=.*/, "", name); sub(/^[^=]*= */, "", preset); sub(/ *#.*/, "", preset)
  sub(/^[^#]*# */, "", text); variables[++known] = sprintf("%-10s %-17s", name, preset); told[known] = text
}
END {
  print "\nVariables and what they are unless given (make train FOLD=0 MODEL=hyena):"
  for (k = 1; k <= known; k++) show(variables[k], told[k])
}
endef
export HELP

help: ## list the targets
	@awk "$$HELP" $(firstword $(MAKEFILE_LIST))
setup: $(ENVIRONMENT) ## create .venv with pinned packages
.venv/.ready: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Next: make PYTHON=python3.12 ..."; exit 2; }
	@echo "setting up .venv (once; downloads the packages of .ci/constraints.txt)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[$(EXTRAS)]"
	touch $@
doctor: $(ENVIRONMENT) ## say what this machine has and what will be used
	@exec $(RNA) doctor --artifacts "$(ARTIFACTS)"
demo: $(ENVIRONMENT) ## the whole chain on a small synthetic data set, on the CPU
	@exec $(RNA) demo --artifacts "$(ARTIFACTS)/demo"
# whatever the environment says of bytecode: each process that a test starts would compile all anew, and so would pytest
test: $(ENVIRONMENT) ## lint, types and all tests that need no GPU, on up to four cores
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	@PYTHONDONTWRITEBYTECODE= exec $(PY) -m pytest -q -m "not gpu" $(SIDE_BY_SIDE)
test-floor: .venv-floor/.ready ## the same tests on the oldest packages that pyproject.toml allows (PYTHON=python3.11)
	@exec .venv-floor/bin/python -m pytest -q -m "not gpu"
.venv-floor/.ready: pyproject.toml .ci/floor-constraints.txt
	@echo "setting up .venv-floor (once; downloads the packages of .ci/floor-constraints.txt)"
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/floor-constraints.txt -e ".[$(EXTRAS)]"
	touch $@
test-faults: $(ENVIRONMENT) ## kill, damage and poison runs at random, and write the table of what happened
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m tests.faults
test-gpu: $(ENVIRONMENT) ## tests that need a GPU, the cheapest first (PY=python3: with what is installed there)
	@exec $(PY) -m pytest -q -m gpu $(GPU:%=tests/%.py)
lint: $(ENVIRONMENT) ## format the code and fix what ruff can fix
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

download: $(ENVIRONMENT) ## fetch the competition's files from Kaggle
	@exec $(RNA) download $(AT) $(foreach file,$(FILES),--file '$(file)')
data: $(ENVIRONMENT) ## raw files in RAW -> checked clean tables
	@exec $(RNA) data $(AT) --raw "$(RAW)"
bpp: $(ENVIRONMENT) ## base-pair probabilities of all sequences (ViennaRNA)
	@exec $(RNA) bpp $(AT)
templates: $(ENVIRONMENT) ## mmCIF or PDB files in RAW -> dated library of RNA chains
	@exec $(RNA) templates $(AT) --raw "$(RAW)"
features: $(ENVIRONMENT) ## embeddings of all sequences as further input: a parquet as embed writes it or a folder of .npy in FILE, NAME=rnafm, then SET='data.features="rnafm"'
	@exec $(RNA) features $(AT) $(ONE_NAME) "$(FILE)"
folds: $(ENVIRONMENT) ## clean tables -> fold of every sequence, verified by its lock (RELOCK=1 writes the lock)
	@exec $(RNA) folds $(AT) --split "$(SPLIT)" $(if $(RELOCK),--relock)
audit: $(ENVIRONMENT) ## measure how much of a split leaks (SPLITS="sim80_k5 random_k5")
	@exec $(RNA) audit $(AT) $(foreach split,$(or $(SPLITS),$(SPLIT)),--split $(split))
plan: $(ENVIRONMENT) ## memory that training MODEL takes, and what would fit (LENGTH=<longest sequence>)
	@exec $(RNA) plan $(AT) $(CONFIG) $(SETTINGS) $(call given,--length,LENGTH) --nproc $(NPROC)
train: $(ENVIRONMENT) ## train one fold of MODEL and predict; starting again resumes (RESTART=1: anew; ALLOW_CHANGES=1: e.g. with more epochs)
	@exec $(RNA) train $(AT) $(VARIANT) --fold "$(FOLD)" $(TRAIN)
train-all: $(ENVIRONMENT) ## train every fold of SPLIT, one after the other; rna3d: after denovo and templates-predict, labelled: after words
	@exec $(RNA) train $(AT) $(VARIANT) --all-folds $(TRAIN) $(WITHOUT_NETWORK)
train-bg: $(ENVIRONMENT) ## train in the background, also with the terminal closed (ALL=1: as train-all)
	@exec $(RNA) train $(AT) $(VARIANT) $(JOB) $(TRAIN) $(if $(ALL),$(WITHOUT_NETWORK)) --background
status: $(ENVIRONMENT) ## all runs: state, step, metric, tokens/s, time left, process (JSON=1 for programs)
	@exec $(RNA) status --artifacts "$(ARTIFACTS)" $(if $(JSON),--json)
logs: $(ENVIRONMENT) ## the last lines of a background run (FOLLOW=1 goes on until it ends)
	@exec $(RNA) logs $(AT) $(NAMED) $(JOB) $(if $(FOLLOW),--follow)
stop: $(ENVIRONMENT) ## let the run of a FOLD save its state and end (ALL=1: the one that trains every fold)
	@exec $(RNA) stop $(AT) $(NAMED) $(JOB)
sweep: $(ENVIRONMENT) ## compare settings: make sweep NAME=lr OVER="train.lr=[1e-3,2e-3]" SEEDS=3 (again, or elsewhere: helps)
	@exec $(RNA) sweep $(AT) $(CONFIG) --split "$(SPLIT)" $(JOB) --name "$(NAME)" --seeds $(SEEDS) \
	  $(foreach axis,$(OVER),--over '$(axis)') $(call given,--trials,TRIALS) $(SETTINGS) $(call given,--time-budget,BUDGET)
replay: $(ENVIRONMENT) ## run a batch that training left out again: where it breaks, what cures it (STEP=<step>)
	@exec $(RNA) replay $(AT) $(NAMED) --fold "$(FOLD)" $(call given,--step,STEP)
predict: $(ENVIRONMENT) ## out-of-fold and test predictions of one trained fold; FILE or SEQ: those of sequences of your own, by all folds (NAME: an ensemble)
	@exec $(RNA) predict $(AT) $(VARIANT) $(if $(OWN_FILE),$(OWN_FILE) $(OWN_FEATURES) $(ONE_FOLD) $(ONE_NAME),--fold "$(FOLD)")
embed: $(ENVIRONMENT) ## last hidden layer of a trained fold for the sequences in FILE, FASTA or table (NUCLEOTIDES=1: of each one too)
	@exec $(RNA) embed $(AT) $(NAMED) --fold "$(FOLD)" $(if $(NUCLEOTIDES),--per-nucleotide) $(OWN_FEATURES) "$(FILE)"
templates-predict: $(ENVIRONMENT) ## candidates from templates, date-gated, as a run of SPLIT (MSA=<folder> uses alignments, and so do later ones until MSA=none)
	@exec $(RNA) templates-predict $(AT) --split "$(SPLIT)" $(MSA_OF)
denovo: $(ENVIRONMENT) ## candidates from pairing and loops of known structures, no network, as a run of SPLIT
	@exec $(RNA) denovo $(AT) --split "$(SPLIT)"
words: $(ENVIRONMENT) ## classes (naive Bayes) or numbers (ridge) of a labelled set by counting words, no network, as a run of SPLIT
	@exec $(RNA) words $(AT) --split "$(SPLIT)"
ensemble: $(ENVIRONMENT) ## folds and models -> one prediction table, weights learned out of fold (PARTIAL=1: of the folds there are)
	@exec $(RNA) ensemble $(AT) --split "$(SPLIT)" --name "$(NAME)" $(if $(PARTIAL),--partial) $(foreach run,$(RUNS),--run $(run))
submit: $(ENVIRONMENT) ## ensemble -> submission file, checked before it gets its name
	@$(RNA) submit $(AT) $(SUBMISSION)
	@$(if $(KAGGLE),exec $(RNA) submit-kaggle $(AT) $(SUBMISSION),:)
submit-kaggle: $(ENVIRONMENT) ## send the submission to Kaggle once, and wait for its score (KAGGLE=1 lets submit do it; KERNEL=owner/slug VERSION=1)
	@exec $(RNA) submit-kaggle $(AT) $(SUBMISSION) $(if $(FILE),--file "$(FILE)") $(if $(KERNEL),--kernel $(KERNEL) $(call given,--version,VERSION))
check: $(ENVIRONMENT) ## check any submission file: make check FILE=my.csv
	@exec $(RNA) check $(AT) "$(FILE)"
evaluate: $(ENVIRONMENT) ## score out-of-fold predictions beside the trivial floors (RUN=<run>: of a single run; ENGINE=usalign or auto: TM-scores by the program)
	@exec $(RNA) evaluate $(AT) $(SCORED) $(call given,--engine,ENGINE)
score-tm: $(ENVIRONMENT) ## both TM-scores of a folder of C1' traces: make score-tm TRACES=<folder> OUT=scores.parquet (ENGINE=usalign)
	@exec $(RNA) score-tm --traces "$(TRACES)" --out "$(OUT)" $(call given,--engine,ENGINE)
structures: $(ENVIRONMENT) ## PDB and mmCIF files of an ensemble, and a page that shows them offline (TABLE=oof: training targets; FILE or SEQ: RNAs of your own; MODEL: by this run alone)
	@exec $(RNA) structures $(AT) --name "$(NAME)" --split "$(SPLIT)" $(call given,--table,TABLE) $(if $(OWN_FILE),$(if $(MODEL),$(CONFIG) $(call given,--tag,TAG)) $(OWN_FILE))
report: $(ENVIRONMENT) ## one self-contained HTML page for the ensemble (RUN=<run>: for a single run, after make evaluate RUN=<run>)
	@exec $(RNA) report $(AT) $(SCORED)

kernel: $(ENVIRONMENT) ## pack a Kaggle notebook without internet (KERNEL=train|predict OWNER=<user> LIMIT=9h ALL=1 RESUME=owner/slug)
	@exec $(RNA) kernel $(AT) --owner "$(OWNER)" --mode $(or $(KERNEL),train) $(VARIANT) $(JOB) --name "$(NAME)" \
	  $(call given,--limit,LIMIT) $(call given,--resume,RESUME)
kernel-push: $(ENVIRONMENT) ## send the bundle to Kaggle, where the notebook starts to run
	@exec $(RNA) kernel-push $(AT) $(BUNDLE)
kernel-status: $(ENVIRONMENT) ## how the notebook is doing (WAIT=12h: until it ended)
	@exec $(RNA) kernel-status $(AT) $(BUNDLE) $(call given,--wait,WAIT)
kernel-pull: $(ENVIRONMENT) ## fetch what the notebook left, verified; trained folds become local runs
	@exec $(RNA) kernel-pull $(AT) $(BUNDLE)
kernel-check: $(ENVIRONMENT) ## rehearse notebooks: bare Python (IMAGE=<python>), no network, read-only inputs (RAW=<folder>: the bundle on its test set)
	@exec $(RNA) kernel-check $(AT) $(call given,--python,IMAGE) $(if $(RAW),--raw "$(RAW)" $(BUNDLE) $(call given,--limit,LIMIT))
handover: $(ENVIRONMENT) ## the files that Kaggle asks of winners, from the ensemble and its settings
	@exec $(RNA) handover $(AT) --name "$(NAME)"

bench: bench-data bench-folds bench-loader bench-kernels bench-models ## all benchmarks but bench-tm, which needs TRACES, and bench-structures, which needs a chain
bench-data: $(ENVIRONMENT) ## the data stage beside pandas, polars, pyarrow and duckdb
	@exec $(RNA) bench-data --artifacts "$(ARTIFACTS)"
bench-kernels: $(ENVIRONMENT) .venv-bench/.ready ## Mamba's scan and Hyena's convolution beside other implementations
	@exec $(RNA) bench-kernels
bench-models: $(ENVIRONMENT) ## training and prediction of whole networks beside RibonanzaNet's architecture
	@exec $(RNA) bench-models
.venv-bench/.ready: .ci/bench-constraints.txt
	@echo "setting up .venv-bench, the peers' own environment (once)"
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch mambapy transformers
	touch $@
bench-tm: $(ENVIRONMENT) ## both TM-scores beside US-align, or TM-align built for this: make bench-tm TRACES=<folder>
	@exec $(RNA) bench-tm --traces "$(TRACES)"
bench-structures: $(ENVIRONMENT) ## time and memory of a target by its length, up to 4,640 nt (after train-all COMP=rna3d)
	@exec $(RNA) bench-structures $(AT) $(CONFIG) --split "$(SPLIT)"
bench-loader: $(ENVIRONMENT) ## batches a second, with and without workers; share of padding
	@exec $(RNA) bench-loader $(AT)
bench-folds: $(ENVIRONMENT) ## our clustering beside MMseqs2 and cd-hit
	@exec $(RNA) bench-folds $(AT)

.DEFAULT:
	$(error $@: no such target. Next: make help lists them)
# What is not the stages' alone stays: another name, or a file beside their folders.
clean: ## remove the artefacts, trained runs too (not the environment, not submissions)
	@here="$$(pwd -P)/"; there="$$(cd "$(ARTIFACTS)" 2>/dev/null && pwd -P || true)"; \
	if [ "$${here#"$${there%/}/"}" != "$$here" ] && [ -n "$$there" ] || \
	   [ -n "$$(find "$(ARTIFACTS)/" -mindepth 1 -maxdepth 1 ! \( -type d $(call named,$(OWN) $(competitions) submissions) \) 2>/dev/null)" ] || \
	   [ -n "$$(find "$(ARTIFACTS)/" -mindepth 1 -maxdepth 2 $(call named,$(OWN) submissions) -prune -o ! -type d -print 2>/dev/null)" ]; then \
	  echo "ARTIFACTS=$(ARTIFACTS) holds more than artefacts; nothing removed. Next: remove by hand what is to go."; exit 2; fi
	@busy="$$(command -v $(PYTHON) >/dev/null && find "$(ARTIFACTS)/" \( -name .lock -o -name .job \) \
	  ! -exec $(PYTHON) -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_SH | fcntl.LOCK_NB)' {} \; -print 2>/dev/null | head -n 1 || true)"; \
	if [ -n "$$busy" ]; then echo "$${busy%/*}: at work now; nothing removed. Next: $$(sed -nE \
	  -e 's!.*/([^/]+)/runs/([^/+]+)(\+([^/]+))?\.([^./]+)(/fold([0-9]+))?$$!make stop COMP=\1 MODEL=\2 SPLIT=\5 TAG=\4 FOLD=\7!' \
	  -e 's! TAG= ! !' -e 's! FOLD=$$! ALL=1!' -e '/^make/p' -e '/^make/!s!.*!make stop!p' <<< "$${busy%/*}")$(ELSEWHERE), or wait for it."; exit 2; fi
	@[ -d "$(ARTIFACTS)" ] || { echo "$(ARTIFACTS): no such folder, nothing to remove"; exit 0; }; \
	find "$(ARTIFACTS)/" -mindepth 1 -maxdepth 1 ! -name submissions -exec rm -rf {} +; \
	rmdir "$(ARTIFACTS)" 2>/dev/null || true; echo "removed: what the stages made below $(ARTIFACTS)"
