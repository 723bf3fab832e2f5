//! stub
use super::Report;
use crate::error::Result;
/// stub
/// # Errors
/// `Io`.
pub fn html(_reports: &[Report], _out: &mut dyn std::io::Write) -> Result<()> {
    Ok(())
}
