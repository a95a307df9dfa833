"""Samplers and pruners by class path, and several objectives: each is made from YAML and run."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS
from optuna.trial import TrialState

from mnist_lit.main import main as fit
from mnist_lit.search import main
from mnist_lit.study import Study
