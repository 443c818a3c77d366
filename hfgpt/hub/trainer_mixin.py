"""transformers' Trainer with the push of hfgpt: only files on the allowlist are sent."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hfgpt.hub.push import Pushed, push
from hfgpt.hub.repository import connect
from hfgpt.hub.retry import one_line_errors, with_retries


class PushByList:
    """Gives transformers' Trainer the push of this file: `class MyTrainer(PushByList, Trainer)`.

    Trainer itself sends its whole output folder with training_args.bin in it, a pickle that holds `hub_token` and paths
    of the machine, and gives up when a commit fails once. Its arguments `push_to_hub`, `hub_model_id`, `hub_token`,
    `hub_private_repo`, `hub_revision` and `hub_strategy` ("end" or "every_save") mean the same here. A push blocks.
    """

    args: Any
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository.

        Raises:
            ValueError: `hub_strategy` would send optimizer states.
        """
        if self.args.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"`hub_strategy` ({self.args.hub_strategy!s}) sends checkpoints with optimizer states, which never "
                'leave. Use "every_save" or "end".'
            )
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        is_private = self.args.hub_private_repo if private is None else private
        with one_line_errors(name):
            api = connect(token or self.args.hub_token)
            url = with_retries(lambda: api.create_repo(name, private=is_private, exist_ok=True), lambda text: None)
        self.hub_model_id = url.repo_id
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Pushed | Future | None:
        """Save the model and push it; see Trainer's. Returns None on all processes but the first."""
        trainer: Any = self
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        assert self.hub_model_id is not None
        card.setdefault("model_name", self.hub_model_id.rpartition("/")[2])
        trainer.create_model_card(**card)
        options = self.options(token, revision, commit_message)
        if not blocking:
            return HfApi().run_as_future(push, self.args.output_dir, self.hub_model_id, **options)
        return push(self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        trainer: Any = self
        if not trainer.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        assert self.hub_model_id is not None
        message = f"Training in progress, step {trainer.state.global_step}"
        push(checkpoint_folder, self.hub_model_id, **self.options(None, None, message))

    def options(self, token: str | None, revision: str | None, message: str | None) -> dict[str, Any]:
        """What Trainer's arguments say about a push."""
        return {
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "message": message or "End of training",
        }
