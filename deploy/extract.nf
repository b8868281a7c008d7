// A Nextflow module: one task for each manifest, such as the parts that `split -n l/16` makes of a list of slides.
// OUT is one folder that all tasks share, outside of Nextflow's work directory: mtdp resumes from it, so a task that is tried
// again goes on where it stopped, and nothing is computed twice. A manifest names its slides by absolute paths.
process MTDP_EXTRACT {
    tag "${manifest.baseName}"
    cpus 8
    memory '8 GB'
    maxRetries 3
    // 1: some slides failed, and failed.csv says why; 2: nothing could start: neither gets better by itself.
    // 130 and 143: interrupted; 137: killed, mostly for memory.
    errorStrategy { task.exitStatus in [3, 130, 137, 143] ? 'retry' : task.exitStatus == 1 ? 'ignore' : 'terminate' }

    input:
    path manifest
    val out
    val model

    output:
    val out

    script:
    """
    mtdp-extract ${manifest} --out ${out} --model ${model} --stage . --threads ${task.cpus}
    """
}
