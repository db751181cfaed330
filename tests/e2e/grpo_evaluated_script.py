"""GRPO with TRL over shards that is also evaluated."""

from datasets import load_dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from ds_cp.trl import GRPOTrainer


def main(arguments: list[str]) -> GRPOTrainer:
    script, config, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name)["train"]
    return GRPOTrainer(
        model=model.model_name_or_path,
        args=config,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=data,
        eval_dataset=data,
    )
