"""Loading and saving: no tensor of a loaded model is random, and a saved model embeds the same when loaded again."""

import inspect
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .adapter_unigd import CONFIG_ARGUMENTS, load_with_adapter
from .backbone_unigd import check_backbone
from .configuration_unigd import UniGDConfig, check_choice
from .digests_unigd import DIGESTS_NAME, VERIFY, check_digests, save_digests
from .hub_files_unigd import check_json, commit_of, find_file, hub_arguments, is_adapter, weight_files
from .loading_info_unigd import errors_name, raise_if_random
from .plausible_unigd import as_large_as
from .probe_unigd import PROBE_NAME, load_probe, probe_difference, probe_tolerance, save_probe
from .processing_unigd import UniGDProcessor
from .save_folder_unigd import check_save_folder
from .sentence_files_unigd import save_sentence_files


logger = logging.getLogger(__name__)

SENTENCE_MODULE_FILE = "sentence_unigd.py"


class UniGDCheckpointModel(PreTrainedModel):
    """How a UniGD model comes from a plain vision-language model or from a checkpoint, and how it is saved."""

    processor: UniGDProcessor | None
    verify_saves: bool

    @classmethod
    def from_vlm(cls, vlm: PreTrainedModel, **config_kwargs):
        """
        Adds a new embedding head to a vision-language model in memory. Parameters are shared, not copied.

        Args:
            vlm (`PreTrainedModel`): An image-text-to-text model with its language-modelling head.
            config_kwargs: Arguments of [`UniGDConfig`] other than `vlm_config`.

        Raises:
            ValueError: `vlm` lacks a part that embedding needs, for example its language-modelling head, or an
                argument of the config is out of range.
        """
        check_backbone(vlm)
        config = UniGDConfig(vlm_config=vlm.config, dtype=vlm.dtype, name_or_path=vlm.name_or_path, **config_kwargs)
        model = cls(config, vlm=vlm)
        model.embedding_head.to(vlm.get_output_embeddings().weight.device)
        # For a quantised or dispatched backbone, Trainer, PEFT and accelerate look for these on the outer model.
        for name in ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
            if hasattr(vlm, name):
                setattr(model, name, getattr(vlm, name))
        if hasattr(vlm, "hf_device_map"):
            model.hf_device_map = {f"vlm.{name}".rstrip("."): device for name, device in vlm.hf_device_map.items()}
        return model.eval()

    @classmethod
    def from_vlm_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads a plain vision-language model and adds a new embedding head to it. Only the head is new: every tensor of
        the backbone must come from the checkpoint.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A Hub id or folder of any decoder-only
                image-text-to-text model, for example `"llava-hf/llava-1.5-7b-hf"`.
            kwargs: Arguments of [`UniGDConfig`] (`head_type`, `embedding_dim`, ...). The rest goes to
                `AutoModelForImageTextToText.from_pretrained` (`dtype`, `attn_implementation`, `device_map`,
                `quantization_config`, `revision`, ...).

        Raises:
            RuntimeError: a tensor of the backbone is missing from the checkpoint; the message names it.
        """
        config_kwargs = {name: kwargs.pop(name) for name in CONFIG_ARGUMENTS & kwargs.keys()}
        vlm, info = AutoModelForImageTextToText.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        raise_if_random(pretrained_model_name_or_path, info)
        vlm.config._commit_hash = commit_of(pretrained_model_name_or_path, kwargs)
        return cls.from_vlm(vlm, **config_kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, verify="probe", **kwargs
    ):
        """
        As [`~PreTrainedModel.from_pretrained`], but raises if a tensor would be random, or if the checkpoint is not
        what was saved.

        An adapter is put on the base model that it names and is not merged into it; this needs `peft`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*): A Hub id or folder. With None,
                `config` and `state_dict` are needed, and a tensor that `state_dict` lacks is initialised, as for any
                model of transformers: the checks are for checkpoints.
            verify (`str`, *optional*, defaults to `"probe"`): How much to check beside the names and shapes of the
                tensors.

                - `"none"`: nothing.
                - `"probe"`: the checkpoint's probe, a fixed input, gives the embeddings and logits that it gave when
                  it was saved. This costs a forward pass of three short rows. It does not see every change: noise in
                  the embeddings of tokens that the probe does not hold changes nothing in it. Quantised, offloaded
                  and sharded models cannot be compared, so they are not.
                - `"digests"`: the probe, and the SHA-256 of every tensor and of every file of the code and processor.
                  This costs another reading of the files.

        Raises:
            ValueError: the checkpoint is a plain vision-language model (use [`from_vlm_pretrained`]), or was saved by
                a newer hf-unigd; its config asks for a much larger model than its files hold; or it has no digests to
                compare with.
            RuntimeError: a tensor is missing from the checkpoint or has another shape, or the probe or a digest
                differs, as the message says.
        """
        check_choice("verify", verify, VERIFY)
        if pretrained_model_name_or_path is None:  # the tensors are given in memory, so there is nothing to compare
            return super().from_pretrained(None, *model_args, output_loading_info=output_loading_info, **kwargs)
        # For an adapter on the Hub, the Auto classes pass its base model's name, and put the adapter's in these.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter = adapter_kwargs.pop("_adapter_model_path", pretrained_model_name_or_path)
        if is_adapter(adapter, {**kwargs, **adapter_kwargs}):
            for name in ("config", "_from_auto"):
                kwargs.pop(name, None)
            kwargs.update(adapter_kwargs)
            model, info = load_with_adapter(cls, adapter, verify=verify, **kwargs)
            model.verify(adapter, verify, **hub_arguments(kwargs))
            return (model, info) if output_loading_info else model
        where = hub_arguments(kwargs)
        check_json(pretrained_model_name_or_path, (CONFIG_NAME, GENERATION_CONFIG_NAME), where)
        if kwargs.get("config") is None:
            config_dict, _ = UniGDConfig.get_config_dict(pretrained_model_name_or_path, **where)
            if config_dict.get("model_type") != UniGDConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {config_dict.get('model_type')!r} checkpoint without an "
                    f"embedding head. `{cls.__name__}.from_vlm_pretrained(...)` adds a new one to it."
                )
        files = weight_files(pretrained_model_name_or_path, where)
        with errors_name(pretrained_model_name_or_path), as_large_as(pretrained_model_name_or_path, files):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        raise_if_random(pretrained_model_name_or_path, info)
        model.config._commit_hash = commit_of(pretrained_model_name_or_path, kwargs)
        if not model.can_generate():  # transformers reads the file only for models that can
            # Without the file, the backbone keeps its own defaults.
            with suppress(OSError):
                model.vlm.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
        model.verify(pretrained_model_name_or_path, verify, **where)
        return (model, info) if output_loading_info else model

    def verify(self, name, verify: str = "probe", **kwargs) -> None:
        """
        Checks that this model is still what the checkpoint was when it was saved.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub id of the checkpoint that this model was loaded from.
            verify (`str`, *optional*, defaults to `"probe"`): As in [`from_pretrained`].
            kwargs: Where the checkpoint is: `revision`, `subfolder`, `token`, `cache_dir`, ...

        Raises:
            ValueError, RuntimeError: as in [`from_pretrained`].
        """
        if verify == "digests":
            check_digests(name, kwargs)
        if verify != "none" and (probe_file := find_file(name, PROBE_NAME, kwargs)):
            with errors_name(name):  # a config may change what the backbone returns
                self._check_probe(name, probe_file)

    def _check_probe(self, name, probe_file: str) -> None:
        if not self._can_be_probed:
            return
        probe = load_probe(probe_file)
        difference, tolerance = probe_difference(self, probe), probe_tolerance(self, probe)
        if difference > tolerance:
            raise RuntimeError(
                f"{name} does not compute what it did when it was saved: its probe is off by {difference:.2g}, and "
                f"rounding explains {tolerance:g}. A weight has changed, or a library computes something else. "
                "`verify='none'` loads it anyway; `hf-unigd doctor` says more."
            )

    @property
    def _can_be_probed(self) -> bool:
        """Whether this process holds all weights, as they were saved."""
        devices = {parameter.device.type for parameter in self.parameters()}
        return not (
            "meta" in devices
            or is_deepspeed_zero3_enabled()
            or is_fsdp_managed_module(self)
            or getattr(self, "hf_quantizer", None) is not None
        )

    def save_pretrained(self, save_directory, *args, state_dict=None, push_to_hub=False, **kwargs):
        """
        As [`~PreTrainedModel.save_pretrained`]. Also saves the model's `processor` (or else the one of the checkpoint
        that the model was loaded from), the probe, what sentence-transformers needs, and the digests of all of it.
        Unless `verify_saves` is False, the folder is loaded again, on the model's device if there is memory for it,
        and compared with the probe. With `push_to_hub=True`, the arguments of [`~PreTrainedModel.push_to_hub`] are
        accepted too.

        Raises:
            FileExistsError: the folder holds the weights of another model, or an adapter. Nothing was written.
                An earlier save of this model is overwritten. [`check_save_folder`] says how they are told apart.
            RuntimeError: the saved folder does not give the same embeddings.
        """
        is_main_process = kwargs.get("is_main_process", True)
        if is_main_process:
            check_save_folder(save_directory, self.config, is_adapter=getattr(self, "_hf_peft_config_loaded", False))
        with _class_without_fsdp(self):
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if is_main_process:
            if not self.can_generate():  # transformers writes the file only for models that can
                self.vlm.generation_config.save_pretrained(save_directory)
            # A state dict is given if the weights are spread over processes; this process cannot embed then.
            self.save_companions(save_directory, has_weights=state_dict is None)
        if push_to_hub:
            accepted = inspect.signature(self.push_to_hub).parameters
            hub_kwargs = {name: value for name, value in kwargs.items() if name in accepted}
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs})

    def save_companions(self, folder, has_weights: bool = True, can_be_opened: bool = True) -> None:
        """
        Saves what belongs beside the weights: the processor, the probe, what sentence-transformers needs, and the
        digests of all files. What is missing is named in a warning.

        Args:
            folder (`str` or `os.PathLike`): The checkpoint's folder, which holds the weights already.
            has_weights (`bool`, *optional*, defaults to `True`): Whether this process holds all weights. A probe
                needs them.
            can_be_opened (`bool`, *optional*, defaults to `True`): Whether the folder can be loaded to verify it. An
                adapter on a base model that was made in memory cannot.

        Raises:
            RuntimeError: the saved folder does not give the same embeddings.
        """
        folder = Path(folder)
        for name in (PROBE_NAME, DIGESTS_NAME):
            (folder / name).unlink(missing_ok=True)  # it may be another model's
        has_probe = self._save_processor_and_probe(folder, has_weights)
        save_digests(folder)
        if has_probe and self.verify_saves and can_be_opened:
            self._verify_save(folder)

    def _verify_save(self, folder: Path) -> None:
        """Loads a folder, which compares it with its probe. This is done on the model's device, which a large model
        saves minutes on, or on the CPU if the device has no memory for a second model."""
        if self.device.type != "cpu":
            try:
                type(self).from_pretrained(folder, dtype=self.dtype, device_map={"": self.device})
                return
            except torch.OutOfMemoryError:
                logger.warning("%s has no memory to verify %s, so the CPU does it.", self.device, folder)
        type(self).from_pretrained(folder, dtype=self.dtype)

    def _save_processor_and_probe(self, folder: Path, has_weights: bool) -> bool:
        """Whether a probe was saved. What was not is named in a warning."""
        processor = self.processor or self.processor_of_checkpoint()
        if processor is None:
            logger.warning(
                "Saved %s without processor, probe and sentence-transformers' modules. Set `model.processor` to the "
                "model's UniGDProcessor to save them too.",
                folder,
            )
            return False
        processor.save_pretrained(folder)
        self._save_sentence_module(folder)
        if not (has_weights and self._can_be_probed):
            logger.warning(
                "Saved %s without a probe, because the weights are sharded, offloaded or quantised. "
                "`load_checkpoint(...)[0].save_pretrained(...)` adds one.",
                folder,
            )
            return False
        save_probe(self, processor, folder)
        return True

    # Models of transformers that have run once cannot be pickled, and unpickled ones cannot run everything. Processes
    # that `SentenceTransformer.encode` starts get the model pickled.

    def __getstate__(self):
        # The first forward pass that captures outputs installs hooks, local functions which cannot be pickled. Without
        # this mark, the next one installs them again.
        for module in self.modules():
            if vars(module).pop("_output_capturing_hooks_installed", False):
                for hooked in module.modules():
                    for key, hook in list(hooked._forward_hooks.items()):
                        if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                            del hooked._forward_hooks[key]
        return vars(self).copy()

    def __setstate__(self, state):
        super().__setstate__(state)
        # What the classes of the backbone can capture is registered when a model is made, for the whole process.
        with torch.device("meta"):
            type(self.vlm)(self.vlm.config)

    def processor_of_checkpoint(self) -> UniGDProcessor | None:
        """The processor in the checkpoint that this model was loaded from, if there is one."""
        if not self.name_or_path:
            return None
        with suppress(OSError, ValueError):  # the checkpoint has none, or a plain model's
            return UniGDProcessor.from_pretrained(self.name_or_path, **self._hub_revision)
        return None

    @property
    def _hub_revision(self) -> dict[str, str]:
        """The commit that this model was loaded from, if it came from the Hub."""
        commit = getattr(self.config, "_commit_hash", None)
        return {"revision": commit} if commit else {}

    def _save_sentence_module(self, folder: Path) -> None:
        code = Path(__file__).with_name(SENTENCE_MODULE_FILE)
        if not code.is_file():  # this is remote code, of which transformers downloads only the files that it imports
            found = find_file(self.name_or_path, SENTENCE_MODULE_FILE, self._hub_revision)
            if found is None:
                return
            code = Path(found)
        if code.resolve() != (folder / code.name).resolve():
            shutil.copyfile(code, folder / code.name)
        # MTEB reads the modalities from here.
        forward = {"method": "forward", "method_output_name": "embeddings"}
        settings = {"modality_config": dict.fromkeys(("text", "image", "message"), forward)}
        prompts = None if self.processor is None else self.processor.instructions
        save_sentence_files(folder, [("", f"{code.stem}.UniGDSentenceModule", settings)], prompts)


@contextmanager
def _class_without_fsdp(model: nn.Module) -> Iterator[None]:
    """FSDP2 gives a model a class made at run time, of which transformers would save torch's source as the model's."""
    made = type(model)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.__class__ = made.__mro__[2]  # after its own class and FSDPModule, as in `FSDPModule.__new__`
    try:
        yield
    finally:
        model.__class__ = made
