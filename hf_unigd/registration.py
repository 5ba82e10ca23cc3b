"""
Registers the model classes with transformers' Auto classes, without making `import hf_unigd` import transformers.

The classes need torch and transformers, whose import takes seconds. `import hf_unigd` must not cost that, and yet
`AutoModel.from_pretrained(...)` must know the classes after it. So the classes are registered at once if transformers
is already imported, and otherwise as the last step of the first `import transformers`.

That step finds transformers importable in full: Python imports a package before any of its submodules, so none of them
is half imported at that time. Other threads that import transformers wait until the classes are registered, because
they wait for the whole import.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Registers the classes now if transformers is already imported, otherwise when it is."""
    if "transformers" in sys.modules:
        register_classes()
    else:
        sys.meta_path.insert(0, _TransformersFinder())


def register_classes() -> None:
    """Registers the classes with every Auto class that loads a checkpoint, which imports torch and transformers."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    # From the submodules: `hf_unigd.modeling` itself may be what imports transformers.
    from .modeling.configuration_unigd import UniGDConfig
    from .modeling.modeling_unigd import UniGDForConditionalGeneration, UniGDModel
    from .modeling.processing_unigd import UniGDProcessor

    AutoConfig.register("unigd", UniGDConfig)
    AutoModel.register(UniGDConfig, UniGDModel)
    AutoModelForImageTextToText.register(UniGDConfig, UniGDForConditionalGeneration)
    if hasattr(transformers, "AutoModelForMultimodalLM"):
        transformers.AutoModelForMultimodalLM.register(UniGDConfig, UniGDForConditionalGeneration)
    AutoProcessor.register(UniGDConfig, UniGDProcessor)


class _TransformersFinder(MetaPathFinder):
    """Finds transformers where the other finders find it, and gives it a loader that registers the classes."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # A module may be looked for without being imported, so the finder stays until the loader has run.
            spec.loader = _TransformersLoader(spec.loader, self)
        return spec


class _TransformersLoader(Loader):
    """Runs transformers' own loader, then registers the classes."""

    def __init__(self, loader: Loader, finder: _TransformersFinder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module gets its own loader back, as with importlib.util.LazyLoader.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        register_classes()
        sys.meta_path.remove(self.finder)
