//! What becomes of machines that nobody is logged in to.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

/// What happens to an account's machine when nobody is logged in and its linger is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Its memory is saved; the next login goes on where she left.
    #[default]
    Save,
    /// It stays running.
    Keep,
    /// It is powered off: only the disk is kept.
    Discard,
}

const POLICIES: &[(Policy, &str)] =
    &[(Policy::Save, "save"), (Policy::Keep, "keep"), (Policy::Discard, "discard")];

impl Policy {
    pub fn parse(name: &str) -> Option<Self> {
        POLICIES.iter().find(|(_, known)| *known == name).map(|(policy, _)| *policy)
    }

    pub fn as_str(self) -> &'static str {
        POLICIES.iter().find(|(policy, _)| *policy == self).map_or("", |(_, name)| name)
    }
}

impl ToSql for Policy {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.as_str().into())
    }
}

impl FromSql for Policy {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let name = value.as_str()?;
        Self::parse(name).ok_or_else(|| {
            FromSqlError::Other(format!("policy \"{name}\" is not known here").into())
        })
    }
}
