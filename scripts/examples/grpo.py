"""Group relative policy optimization with TRL: prompts, completions of the model itself, and a reward of each."""

from datasets import load_dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ds_cp.trl import GRPOTrainer


def variety(completions: list[str], **_: object) -> list[float]:
    """The share of characters that a completion has not had before."""
    return [len(set(text)) / max(len(text), 1) for text in completions]


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    script, config, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name)
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        args=config,
        reward_funcs=variety,
        train_dataset=data[script.dataset_train_split],
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
