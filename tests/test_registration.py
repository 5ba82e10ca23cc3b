"""`import hf_unigd` imports neither torch nor transformers, and the Auto classes know our classes all the same."""

import os
import pickle
import subprocess
import sys

import pytest

import hf_unigd
from hf_unigd import UniGDForConditionalGeneration, UniGDProcessor
from tiny_models import make_vlm


# Loads the checkpoint with every Auto class, as a user does after the imports of each test.
LOAD = """
import inspect
import transformers
classes = {
    "AutoConfig": "UniGDConfig",
    "AutoModel": "UniGDModel",
    "AutoModelForImageTextToText": "UniGDForConditionalGeneration",
    "AutoModelForMultimodalLM": "UniGDForConditionalGeneration",
    "AutoProcessor": "UniGDProcessor",
}
assert transformers.AutoConfig.for_model("unigd").model_type == "unigd"
for auto_class, expected in classes.items():
    if hasattr(transformers, auto_class):
        loaded = type(getattr(transformers, auto_class).from_pretrained(folder))
        assert loaded.__name__ == expected, (auto_class, loaded)
        assert loaded.__module__.startswith("hf_unigd.modeling"), loaded.__module__
assert "Lazy" in inspect.getsource(transformers)  # it has its own loader
assert not any("hf_unigd" in type(finder).__module__ for finder in sys.meta_path), sys.meta_path
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registration")
    tiny = make_vlm()
    UniGDForConditionalGeneration.from_vlm(tiny.model).save_pretrained(folder)
    UniGDProcessor(tiny.processor).save_pretrained(folder)
    return folder


def run(code: str, *arguments) -> str:
    """Standard output of a process of its own; `folder` is its first argument."""
    script = f"import sys\nfolder = sys.argv[-1]\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "imports",
    [
        # Looking for transformers, as many libraries do, is not yet importing it.
        "import hf_unigd, importlib.util\nassert importlib.util.find_spec('transformers').origin\n"
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(folder)",
        "from hf_unigd import UniGDModel\nassert UniGDModel.config_class.model_type == 'unigd'",
        "import hf_unigd.modeling.probe_unigd",
        "import hf_unigd, peft",  # a library that imports transformers while it is imported itself
    ],
)
def test_every_auto_class_loads_after(imports, folder):
    run(imports + LOAD, folder)


def test_every_auto_class_loads_after_a_config_is_unpickled(folder):
    config = pickle.dumps(hf_unigd.UniGDConfig()).hex()
    run(f"import pickle\nconfig = pickle.loads(bytes.fromhex({config!r}))" + LOAD, folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_auto_class_loads_in_a_forked_process(folder):
    code = """
import os
import hf_unigd
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run(code + LOAD, folder)


def test_threads_that_import_transformers_and_the_package_both_find_the_classes(folder):
    """One thread imports transformers, and has come to the registration when another imports hf_unigd.modeling."""
    code = """
import threading, time
from hf_unigd import registration

register, reached, failures = registration.register_classes, threading.Event(), []

def register_late():
    reached.set()
    while "hf_unigd.modeling" not in sys.modules:
        time.sleep(0.01)
    time.sleep(0.2)  # the other thread now waits for transformers
    register()

def import_transformers():
    from transformers import AutoConfig
    AutoConfig.for_model("unigd")

def import_modeling():
    reached.wait()
    import hf_unigd.modeling
    hf_unigd.modeling.UniGDModel

registration.register_classes = register_late
threading.excepthook = failures.append
threads = [threading.Thread(target=target) for target in (import_transformers, import_modeling)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""
    run(code + LOAD, folder)


def test_the_package_lists_and_loads_its_names():
    assert set(hf_unigd.__all__) <= set(dir(hf_unigd))
    for name in hf_unigd.__all__:
        assert getattr(hf_unigd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'UniGDDancer'"):
        hf_unigd.UniGDDancer  # noqa: B018


@pytest.mark.parametrize(
    "command",
    [
        "import hf_unigd",
        "from hf_unigd.cli.main import main\nmain(['--help'])",
        "from hf_unigd.cli.main import main\nmain(['--version'])",
        "import runpy\nsys.argv = ['hf_unigd', '--help']\nrunpy.run_module('hf_unigd', run_name='__main__')",
        "from importlib.metadata import entry_points\n"
        "(script,) = entry_points(group='console_scripts', name='hf-unigd')\nscript.load()(['--help'])",
    ],
)
def test_help_and_version_import_neither_torch_nor_transformers(command):
    imported = "\nprint({'torch', 'transformers', 'trl', 'numpy'} & sys.modules.keys())"
    assert run(command + imported).splitlines()[-1] == "set()"
