//! `phalanx warm-kernels`: what workers would compile at their first start.

use anyhow::Context;
use phalanx_kernels::cuda::{KernelCache, WarmRequest, warm};

use crate::args::WarmKernelsArgs;

#[expect(clippy::print_stdout, reason = "the list is the command's output")]
pub(crate) fn run(args: WarmKernelsArgs) -> anyhow::Result<()> {
    let user = || KernelCache::of_environment(|name| std::env::var_os(name)).directory;
    let directory = args
        .output
        .or_else(user)
        .context("give --output: there is no $HOME")?;
    let request = WarmRequest {
        arch: args.arch,
        head_dims: args.head_dim,
        kv_dtypes: args.kv_cache_dtype.into_iter().map(Into::into).collect(),
    };
    for kernel in warm(&request, &directory)? {
        let state = if kernel.compiled { "compiled" } else { "was there" };
        println!("{state:9} {:>8} bytes  {}", kernel.bytes, kernel.path.display());
    }
    Ok(())
}
