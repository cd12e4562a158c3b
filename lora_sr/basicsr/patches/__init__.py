"""The patches of BasicSR 1.4.2, a module per subject, a function per defect.

Each ``patch_…`` names the defect that it patches, looks for that defect (never for a version, since BasicSR is also run
from a clone), and leaves BasicSR as it is where the defect is absent. BasicSR imports names from module to module, and
a clone's ``train.py`` runs as ``__main__``: a function that is replaced is therefore replaced in every module that
holds it.
"""

from __future__ import annotations


def apply() -> None:
    """Patch whatever is defective in BasicSR, which has been imported. May be called again."""
    from lora_sr.basicsr.patches import (
        average,
        checkpoints,
        degradations,
        distributed,
        divergence,
        feeding,
        images,
        lmdb,
        losses,
        messages,
        optimizers,
        options,
        prefetch,
        resume,
        roots,
        samples,
        validation,
    )

    for patch in (
        resume.patch_training_state_types,
        optimizers.patch_get_optimizer,
        lmdb.patch_lmdb_backend,
        lmdb.patch_reading_of_databases,
        images.patch_imfrombytes,
        roots.patch_paired_image_dataset,
        prefetch.patch_prefetch_thread,
        prefetch.patch_prefetchers,
        feeding.patch_cuda_prefetcher,
        feeding.patch_feed_data,
        feeding.patch_realesrgan_dataset,
        samples.patch_build_dataloader,
        samples.patch_update_learning_rate,
        samples.patch_create_train_val_dataloader,
        validation.patch_validation,
        validation.patch_best_metrics,
        divergence.patch_reduce_loss_dict,
        messages.patch_message_logger,
        messages.patch_init_wandb_logger,
        options.patch_ordered_yaml,
        distributed.patch_distributed_start,
        distributed.patch_model_to_device,
        resume.patch_check_resume,
        resume.patch_load_resume_state,
        checkpoints.patch_load_network,
        checkpoints.patch_weights_of_parts,
        resume.patch_resume_training,
        checkpoints.patch_saving,
        checkpoints.patch_build_model,
        checkpoints.patch_frozen_warnings,
        checkpoints.patch_missing_lora_warnings,
        average.patch_average,
        average.patch_average_of_frozen,
        options.patch_network_options,
        degradations.patch_degradation_device,
        degradations.patch_views,
        losses.patch_perceptual_criterion,
        options.patch_copy_opt_file,
        options.patch_parse_options,
    ):
        try:
            patch()
        except ModuleNotFoundError as error:  # a clone without that module is without its defect
            if (error.name or '').partition('.')[0] != 'basicsr':
                raise
