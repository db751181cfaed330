"""Direct preference optimization with TRL: prompts with a chosen and a rejected completion; LoRA by arguments."""

from datasets import load_dataset
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ds_cp.trl import DPOTrainer


def main(arguments: list[str] | None = None) -> DPOTrainer:
    script, config, model = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name)
    trainer = DPOTrainer(
        model=model.model_name_or_path,
        args=config,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if config.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
