"""Serve a model: embeddings, chats, and, with an index, search and answers, as OpenAI's API has them."""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Annotated

from ..hub import load_checkpoint
from ..hub.loading import load_checkpoint_or_vlm
from ..retrieval import EmbeddingIndex
from ..serving.limits import Limits
from ..settings import AtLeast
from .arguments import accelerator, dtype_field
from .parser import CommandParser


@dataclass
class ServeArguments(Limits):
    model: str = field(metadata={"help": "Trained checkpoint or adapter: a Hub id or a folder."}, kw_only=True)
    index: str | None = field(
        default=None, metadata={"help": "Folder or address that `hf-unigd index` wrote to, to search and answer from."}
    )
    name: str | None = field(
        default=None, metadata={"help": "Name that clients call the model, instead of `--model`."}
    )
    dtype: str = dtype_field("Data type to load the backbone in.")
    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "Address to listen at. One that other machines reach needs `--api_key`, or `--allowed_hosts`."
        },
    )
    port: Annotated[int, AtLeast(0)] = field(default=8000, metadata={"help": "Port to listen at; 0 for a free one."})
    api_key: str | None = field(
        default=None, metadata={"help": "Key that clients send. A file that `--config` names keeps it out of `ps`."}
    )
    allowed_hosts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Instead of a key, the names by which anybody may ask, such as that of a proxy which lets in whom "
            "it should."
        },
    )

    page: bool | None = field(
        default=None,
        metadata={"help": "Whether there is a page for a browser at `/`. By default where gradio is installed."},
    )

    before: str | None = field(
        default=None,
        metadata={
            "help": "What the model was trained from, a plain model or a checkpoint, to show what has changed. It "
            "takes memory of its own."
        },
    )

    def __post_init__(self):
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("`--api_key` is empty. Give a key, or leave it out.")
        if self.allowed_hosts and self.api_key is not None:
            raise ValueError("Give `--api_key`, with which any host may be asked, or `--allowed_hosts`, not both.")
        for host in self.allowed_hosts or []:
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", host):
                raise ValueError(f"`--allowed_hosts {host}` is no name such as model.example, without scheme or port.")


def main(argv: list[str]) -> None:
    (args,) = CommandParser("serve", ServeArguments, description=__doc__).parse(argv)
    try:
        from ..serving.app import create_app
        from ..serving.engine import Engine
        from ..serving.metrics import Metrics
        from ..serving.server import Server, bind, is_loopback
    except ImportError as error:
        raise ImportError(f"`hf-unigd serve` needs {error.name}: `pip install 'hf-unigd[serve]'`.") from error
    has_gradio = find_spec("gradio") is not None
    if args.page and not has_gradio:
        raise ImportError("`--page` needs gradio: `pip install 'hf-unigd[app]'`.")
    page = has_gradio if args.page is None else args.page
    bound = bind(args.host, args.port)
    if args.api_key is None and not args.allowed_hosts and not is_loopback(bound):
        raise ValueError(
            f"`--host {args.host}` lets other machines in. Give `--api_key KEY`, listen at 127.0.0.1 alone, or name "
            "the hosts that anybody may ask (`--allowed_hosts`)."
        )
    index = None if args.index is None else EmbeddingIndex.load(args.index)
    model, processor = load_checkpoint(args.model, dtype=args.dtype)
    model = model.to(accelerator())
    if index is not None:
        index.check_model(model, processor)
    before = None
    if args.before is not None:
        other, its_processor = load_checkpoint_or_vlm(args.before, dtype=args.dtype)
        before = other.to(accelerator()).eval(), its_processor
    engine = Engine(model, processor, args, Metrics())
    engine.start()
    name = args.name or args.model
    app = create_app(engine, name, index, args.api_key, page, before, args.allowed_hosts or ())
    address = f"http://{args.host}:{bound.getsockname()[1]}"
    print(f"Serving {name} at {address}/v1" + (f", and a page at {address}/" if page else ""), flush=True)
    try:
        Server(app, engine).run(sockets=[bound])
    finally:
        engine.stop()
