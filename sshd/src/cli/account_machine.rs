//! `hermitage account start|stop|reset|factory-reset`: an account's machine.

use super::context::Context;
use super::{admin, time};
use anyhow::{Context as _, bail};
use hermitage::admin::protocol::Request;
use hermitage_storage::accounts::Account;
use hermitage_storage::saved;
use serde_json::json;

/// Seconds that a factory reset may take.
const CLOSED: i64 = 120;

pub fn start(context: &Context, name: &str) -> anyhow::Result<()> {
    context.accounts()?.named(name)?;
    if !admin::tell(context, &Request::StartAccount { account: name.to_owned() })? {
        bail!("the service is not running; machines are started by hermitage serve");
    }
    done(context, name, "running", &format!("{name}'s machine runs"))
}

pub fn stop(context: &Context, name: &str) -> anyhow::Result<()> {
    let account = context.accounts()?.named(name)?;
    // Without a service there is no machine.
    admin::tell(context, &Request::StopAccount { account: name.to_owned() })?;
    match context.state.snapshot(account.id).exists() {
        true => done(context, name, "saved", &format!("{name}'s machine is saved")),
        false => done(context, name, "stopped", &format!("{name}'s machine is stopped")),
    }
}

pub fn reset(context: &Context, name: &str) -> anyhow::Result<()> {
    let account = context.accounts()?.named(name)?;
    drop_memory(context, &account)?;
    let words = format!("{name}'s next login starts from the disk; all files are kept");
    done(context, name, "stopped", &words)
}

/// The disk is made anew from the template, as for a new account.
pub fn factory_reset(context: &Context, name: &str, yes: bool) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let account = accounts.named(name)?;
    if !yes {
        bail!("this deletes every file of {name}; say so with --yes");
    }
    if context.state.current_base()?.is_none() {
        bail!("there is no base to take a new disk from; hermitage base build makes one");
    }
    // Closed meanwhile, so that nobody starts the machine on the old disk. If this is killed it opens by itself.
    let open = account.closed_at(time::now()).is_none();
    if open {
        accounts.disable_until(account.id, time::now() + CLOSED)?;
        admin::account_changed(context, name);
    }
    // This fails if a machine is still on its way out.
    let outcome = drop_memory(context, &account).and_then(|()| context.renew_disk(&account));
    if open {
        accounts.set_disabled(account.id, false)?;
        admin::account_changed(context, name);
    }
    outcome?;
    done(context, name, "stopped", &format!("{name} has a new, empty disk"))
}

/// By the service, which may have the machine; without one, here.
fn drop_memory(context: &Context, account: &Account) -> anyhow::Result<()> {
    let request = Request::ResetAccount { account: account.name.clone() };
    if !admin::tell(context, &request)? && context.state.disk(account.id).exists() {
        let dir = context.state.account_dir(account.id);
        saved::withdraw(&context.state, account.id)
            .with_context(|| format!("dropping what was saved in {}", dir.display()))?;
    }
    Ok(())
}

fn done(context: &Context, name: &str, machine: &str, words: &str) -> anyhow::Result<()> {
    context.out.show(&json!({ "account": name, "machine": machine }), || words.to_owned())
}
