//! `hermitage account invite`.

use super::context::Context;
use super::{date, time};
use anyhow::bail;
use hermitage_storage::accounts::Change;
use serde_json::json;

/// How long a code is good unless told.
const WEEK: i64 = 7 * 86_400;

pub const HELP: &str = "\
Prints a code. Whoever has it logs in with it as the password, gives the account a public key or a password of her
own, and is logged out; then the code is used up. It is kept as a hash, so it is shown this once; a new one takes
the place of a former one.

Examples:
  hermitage account invite alice
  hermitage account invite alice --expires 24h
  hermitage account invite alice --revoke

What alice does:
  ssh alice@this-host                         the code is the password; then she is asked for a key or a password
  ssh alice@this-host < ~/.ssh/id_ed25519.pub";

#[derive(Debug, clap::Args)]
pub struct Invite {
    name: String,
    /// Until when it is good [default: 7d]
    #[arg(long, value_name = "TIME", value_parser = date::parse)]
    expires: Option<i64>,
    /// Take the code back that was given before
    #[arg(long, conflicts_with = "expires")]
    revoke: bool,
}

pub fn run(context: &Context, invite: &Invite) -> anyhow::Result<()> {
    let accounts = context.accounts()?;
    let name = &invite.name;
    let account = accounts.named(name)?;
    if invite.revoke {
        let changed = accounts.uninvite(account.id)? == Change::Done;
        let object = json!({ "account": name, "code": null, "expires": null, "changed": changed });
        return context.out.show(&object, || match changed {
            true => format!("{name}'s invitation is taken back"),
            false => format!("{name} had no invitation"),
        });
    }
    let expires = invite.expires.unwrap_or_else(|| time::now() + WEEK);
    if expires <= time::now() {
        bail!("{} UTC is past; no invitation was made", time::short(expires));
    }
    let code = accounts.invite(account.id, expires)?;
    if let Some(closed) = account.closed_at(time::now()) {
        context.out.note(format!(
            "the code is refused as long as it is so: {}",
            hermitage::closing::words(closed)
        ));
    }
    let object = json!({
        "account": name,
        "code": code,
        "expires": time::rfc3339(expires),
        "changed": true,
    });
    context.out.show(&object, || {
        format!(
            "{code}\n\nlets {name} in once, until {} UTC: ssh {name}@… with it as the password, then her \
             public key or a password of her own is asked for",
            time::short(expires)
        )
    })
}
