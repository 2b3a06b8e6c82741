//! What a list asks for, against what there is.

use super::in_parallel;
use super::rows::{Problem, Row};
use crate::cli::account_add::missing_keys;
use crate::cli::account_quota;
use crate::cli::context::Context;
use hermitage_storage::accounts::{Account, Accounts, Changes, NewAccount, Step, verify_password};

/// `None`: all is so already.
pub struct Planned(pub Option<Step>);

impl Planned {
    pub fn outcome(&self, dry_run: bool) -> &'static str {
        match (&self.0, dry_run) {
            (None, _) => "already so",
            (Some(Step::Create(_)), false) => "added",
            (Some(Step::Create(_)), true) => "to be added",
            (Some(Step::Change(..)), false) => "changed",
            (Some(Step::Change(..)), true) => "to be changed",
        }
    }
}

/// What is to be done for each row; what can't be is added to `problems`. New passwords are not hashed
/// yet.
pub fn plan(
    context: &Context,
    accounts: &Accounts,
    rows: &[Row],
    update: bool,
    problems: &mut Vec<Problem>,
) -> anyhow::Result<Vec<Planned>> {
    let there: Vec<Option<Account>> =
        rows.iter().map(|row| accounts.by_name(row.name.as_str())).collect::<Result<_, _>>()?;
    let pairs: Vec<_> = rows.iter().zip(&there).collect();
    let fits = in_parallel(&pairs, |(row, there)| match (&row.password, there) {
        (Some(password), Some(there)) => {
            verify_password(there.password.as_deref(), password.as_bytes())
        }
        _ => true,
    });
    let mut planned = Vec::with_capacity(rows.len());
    for ((row, there), password_fits) in pairs.into_iter().zip(fits) {
        let mut wrong = |words: String| problems.push(Problem { line: row.line, words });
        if let Err(error) = row.wanted.check(context) {
            wrong(format!("{error:#}"));
        }
        planned.push(match there {
            None => Planned(Some(Step::Create(create(context, row)))),
            Some(there) => {
                let planned = change(accounts, row, there, password_fits, update, &mut wrong)?;
                if let Planned(Some(Step::Change(_, changes))) = &planned
                    && update
                    && let Err(words) = account_quota::check(context, there, changes)
                {
                    wrong(words);
                }
                planned
            }
        });
    }
    Ok(planned)
}

fn create(context: &Context, row: &Row) -> NewAccount {
    let mut new = NewAccount::new(row.name.clone());
    row.wanted.fill(context, &mut new);
    new.keys = row.keys.clone();
    new.disabled = row.disabled.unwrap_or(false);
    new
}

fn change(
    accounts: &Accounts,
    row: &Row,
    there: &Account,
    password_fits: bool,
    update: bool,
    wrong: &mut impl FnMut(String),
) -> anyhow::Result<Planned> {
    let name = &row.name;
    let differences = row.wanted.differences(there);
    let mut words: Vec<String> = differences.iter().map(|d| d.words.clone()).collect();
    let missing = missing_keys(accounts, there, &row.keys)?;
    let has = accounts.keys(there.id)?;
    for key in &missing {
        // One that is there with other options is not made another in passing.
        let other = has.iter().find(|has| has.blob == key.blob());
        match other {
            Some(_) => wrong(format!(
                "{name} has the key {} with other options; take it away first: hermitage account key \
                 remove {name} {0}",
                key.fingerprint()
            )),
            None => words.push(format!("the key {} is not there", key.fingerprint())),
        }
    }
    let disabled = row.disabled.filter(|wanted| *wanted != there.disabled);
    if let Some(wanted) = disabled {
        words.push(format!("it is {}disabled", if wanted { "not " } else { "" }));
    }
    if !password_fits {
        words.push("its password is another".into());
    }
    if words.is_empty() {
        return Ok(Planned(None));
    }
    if !update {
        wrong(format!("{name} is there and differs: {}; --update changes it", words.join("; ")));
    } else if let Some(disk) = differences.iter().find(|d| d.option.starts_with("--disk")) {
        wrong(format!(
            "{name} is there, and {}; a disk is changed by: hermitage account set {name} {}",
            disk.words, disk.option
        ));
    }
    let changes = Changes {
        disabled,
        keys: missing.into_iter().cloned().collect(),
        // A place for its hash.
        password: (!password_fits).then(String::new),
        ..row.wanted.changes()
    };
    Ok(Planned(Some(Step::Change(there.id, changes))))
}
